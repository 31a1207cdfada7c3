"""From an authors' checkpoint to `pretrained=True`, through the real client and a Hub on loopback, in separate processes."""
import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import convert
import pytest
import sources
import timm
import torch
import yaml
from conftest import MODELS, TOKENS, difference
from hub_server import HubServer
from reference import authors_state_dict, in_authors_layout, logits
from test_checkpoint import save_as_the_authors_do
from test_models import macs

from timm_smpconv import pretrained
from timm_smpconv.checkpoint import checkpoint_filter_fn
from timm_smpconv.recipe import recipe_names

ROOT = Path(__file__).parent.parent
TINY, MOBILE = 'timm-smpconv/smpconv_tiny.in1k', 'timm-smpconv/smpconv_mobile31.in1k'


@pytest.fixture(scope='module')
def hub():
    with HubServer(TOKENS) as hub:
        yield hub


@pytest.fixture
def python(hub, tmp_path):
    """Runs code or a script in a process that knows this Hub only; an empty cache unless the test gives one."""
    def python(*command, token=None, cache=None, wait=True, **environ):
        environ = {
            **{k: v for k, v in os.environ.items() if not k.startswith('HF_')}, **hub.environment(token),
            'HF_HOME': str(cache or tmp_path / 'cache'), 'PYTHONWARNINGS': 'ignore', **environ}
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=tmp_path, env=environ, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return finished(process) if wait else process
    return python


def finished(process):
    stdout, stderr = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """What convert.py makes of mobile31 in the authors' layout, and the state dict it was made of."""
    path = tmp_path_factory.mktemp('mobile')
    sd = authors_state_dict('smpconv_mobile31')
    file = save_as_the_authors_do(path / 'mobile.pth.tar', ema=sd)
    assert convert.main([file, '--model', 'smpconv_mobile31', '--out', str(path / 'mobile')]) == 0
    return path / 'mobile', sd


@pytest.fixture
def published(hub, folder, python):
    """mobile31 on the Hub, at its place; the test may change that."""
    result = publish(python, folder[0], MOBILE)
    assert result.returncode == 0, result.stderr
    yield
    hub.repair()
    hub.repositories.clear()


def publish(python, path, repo, *options, token='hf_writer'):
    """With a copy of sources.yaml beside it."""
    listed = Path(path).parent / 'sources.yaml'
    shutil.copy(ROOT / 'weights' / 'sources.yaml', listed)
    return python(
        ROOT / 'weights' / 'publish.py', path, '--repo-id', repo, '--sources', listed, *options, token=token)


LOAD = '''
import sys
import timm, torch
import timm_smpconv
from timm_smpconv import pretrained
from timm_smpconv.checkpoint import checkpoint_filter_fn
x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))

def tried(*args, **kwargs):
    """The logits, or the message of the error."""
    try:
        with torch.inference_mode():
            return timm.create_model(*args, pretrained=True, **kwargs).eval()(x)
    except timm_smpconv.CheckpointError as error:
        return str(error)

found = []
{}
torch.save(found, 'found.pth')
'''
MOBILE_FROM_HUB = f'tried("smpconv_mobile31", pretrained_cfg_overlay=dict(hf_hub_id="{MOBILE}"))'


def load(python, tmp_path, code, **kwargs):
    result = python('-c', LOAD.replace('{}', code), **kwargs)
    assert result.returncode == 0, result.stderr
    return torch.load(tmp_path / 'found.pth')


def image(channels=3):
    return torch.randn(1, channels, 64, 96, generator=torch.Generator().manual_seed(1))


def test_convert_publish_and_load_in_every_way(hub, python, tmp_path):
    sd = authors_state_dict('smpconv_tiny')
    file = save_as_the_authors_do(tmp_path / 'SMPConv_T.pth', ema=sd, model=authors_state_dict('smpconv_tiny', seed=1))
    out = tmp_path / 'tiny'
    result = python(ROOT / 'weights' / 'convert.py', file, '--model', 'smpconv_tiny', '--out', out, '--merged')
    assert result.returncode == 0, result.stderr
    result = publish(python, out, TINY)
    assert result.returncode == 0, result.stderr
    files = hub.files(TINY)
    assert {name: files[name] for name in convert.FILES} == {p.name: p.read_bytes() for p in out.iterdir()}
    entry = sources.load_sources(tmp_path / 'sources.yaml')['smpconv_tiny.in1k']
    assert entry['sha256'] == hashlib.sha256(files['model.safetensors']).hexdigest()
    assert entry['origin']['sha256'] == hashlib.sha256(Path(file).read_bytes()).hexdigest()
    assert entry['commit'] == hub.repositories[TINY].branches['main'] and entry['commit'] in result.stdout
    code = f'''
for name in ("smpconv_tiny", "smpconv_tiny.in1k", "hf-hub:{TINY}", "local-dir:{out}", "local-dir:{out}-merged"):
    found.append(tried(name))
with torch.inference_mode():
    found.append(torch.hub.load({str(ROOT)!r}, "smpconv_tiny", source="local", pretrained=True).eval()(x))
    model = timm.create_model("smpconv_tiny", pretrained=True, num_classes=5, in_chans=1).eval()
    found.append(model.get_classifier().out_features)
    found.append(model.forward_features(x.mean(1, keepdim=True)))
    found.append(timm.create_model("smpconv_tiny", pretrained=True, features_only=True).eval()(x))
    found.append(timm.create_model("local-dir:{out}-merged", pretrained=True, features_only=True).eval()(x))
    found.append(timm.list_models("smpconv*", pretrained=True))
'''
    found = load(python, tmp_path, code)
    expected = logits(sd, 'smpconv_tiny', image())
    assert all(torch.equal(found[0], found[i]) for i in (1, 2, 3, 5))
    assert difference(found[0], expected) < 1e-5 and difference(found[4], expected) < 1e-5
    gray = dict(sd, **{'stem.0.conv.weight': sd['stem.0.conv.weight'].sum(1, keepdim=True)})  # as timm adapts it
    model = timm.create_model('smpconv_tiny', in_chans=1, num_classes=0).eval()
    model.load_state_dict(checkpoint_filter_fn(without_classifier(gray), model))
    with torch.inference_mode():
        assert found[6] == 5 and difference(found[7], model.forward_features(image().mean(1, keepdim=True))) < 1e-5
    assert [f.shape[1:] for f in found[8]] == [(96, 16, 24), (192, 8, 12), (384, 4, 6), (768, 2, 3)]
    assert all(difference(a, b) < 1e-5 for a, b in zip(found[8], found[9], strict=True))
    assert found[10] == ['smpconv_base.in1k', 'smpconv_tiny.in1k']
    assert hub.count('GET', 'model.safetensors') == 2  # to verify, and once for all that followed

    before = len(hub.requests)
    offline = load(python, tmp_path, 'found.append(tried("smpconv_tiny"))', HF_HUB_OFFLINE='1')
    assert torch.equal(offline[0], found[0]) and len(hub.requests) == before


def without_classifier(sd):
    return {k: v for k, v in sd.items() if k not in ('head.weight', 'head.bias')}


def test_a_second_revision(hub, published, python, tmp_path):
    sd = authors_state_dict('smpconv_mobile31', seed=2)
    file = save_as_the_authors_do(tmp_path / 'other.pth', ema=sd)
    assert convert.main([file, '--model', 'smpconv_mobile31', '--out', str(tmp_path / 'other')]) == 0
    result = publish(python, tmp_path / 'other', MOBILE, '--revision', 'retrained')
    assert result.returncode == 0 and 'not recorded' in result.stdout, result.stderr
    found = load(python, tmp_path, f'found += [tried("hf-hub:{MOBILE}@retrained"), tried("hf-hub:{MOBILE}")]')
    for state, actual in zip((sd, authors_state_dict('smpconv_mobile31')), found):
        assert difference(actual, logits(state, 'smpconv_mobile31', image())) < 1e-5


def test_a_download_that_is_cut_and_one_that_fails_at_first(hub, published, python, tmp_path):
    hub.cut('.safetensors', 1000, times=20)
    (cut,) = load(python, tmp_path, f'found.append({MOBILE_FROM_HUB})')
    assert 'could not be had' in cut and not list(tmp_path.glob('cache/hub/*/snapshots/*/*'))
    hub.repair()
    hub.fail('HEAD', '.safetensors', 500, times=2)
    again = load(python, tmp_path, f'found += [{MOBILE_FROM_HUB}, {MOBILE_FROM_HUB}]')
    expected = logits(authors_state_dict('smpconv_mobile31'), 'smpconv_mobile31', image())
    assert difference(again[1], expected) < 1e-5  # the first call succeeds with clients that try again


def test_a_file_that_is_not_the_published_one(hub, published, folder, python, tmp_path):
    data = bytearray(hub.files(MOBILE)['model.safetensors'])
    data[-1000] ^= 1
    hub.alter(MOBILE, 'model.safetensors', bytes(data))
    (spoilt,) = load(python, tmp_path, f'found.append({MOBILE_FROM_HUB})')
    assert 'announced a file of sha256' in spoilt and 'removed from the cache' in spoilt
    assert not [path for path in tmp_path.glob('cache/hub/*/*/**/*') if path.stat().st_size > 1e6]
    hub.alter(MOBILE, 'model.safetensors', (folder[0] / 'model.safetensors').read_bytes())
    code = f'''
found.append({MOBILE_FROM_HUB})
pretrained.SHA256["smpconv_mobile31.in1k"] = "0" * 64
found.append({MOBILE_FROM_HUB})
found.append(tried("hf-hub:{MOBILE}"))
'''
    good, refused, named = load(python, tmp_path, code)
    assert torch.equal(good, named) and f'knows {"0" * 64}: they were changed after its release' in refused


def test_what_is_not_there_or_not_allowed(hub, published, python, tmp_path):
    hub.repositories[MOBILE].private = True
    code = f'found += [tried("smpconv_base"), {MOBILE_FROM_HUB}, tried("smpconv_mobile51")]'
    missing, private, never = load(python, tmp_path, code)
    for message, repo in ((missing, 'timm-smpconv/smpconv_base.in1k'), (private, MOBILE)):
        assert f'tried model.safetensors of {repo} at {hub.url} and in the cache {tmp_path}' in message
        for way in ('weights/publish.py', 'local-dir:DIR', 'pretrained_cfg_overlay=dict(file='):
            assert way in message
    assert never.startswith('there are no weights of smpconv_mobile51: the authors published none. Train it')
    (allowed,) = load(python, tmp_path, f'found.append({MOBILE_FROM_HUB})', token='hf_reader')
    assert isinstance(allowed, torch.Tensor)


def test_two_processes_at_once(hub, published, python, tmp_path):
    before = hub.count('GET', 'model.safetensors')
    code = LOAD.replace('{}', f'found.append({MOBILE_FROM_HUB})').replace("'found.pth'", 'sys.argv[1]')
    processes = [python('-c', code, f'{i}.pth', wait=False) for i in range(2)]
    for process in processes:
        assert finished(process).returncode == 0
    one, two = (torch.load(tmp_path / f'{i}.pth')[0] for i in range(2))
    assert torch.equal(one, two) and hub.count('GET', 'model.safetensors') - before in (1, 2)
    assert len([path for path in tmp_path.glob('cache/hub/*/blobs/*') if path.stat().st_size > 1e6]) == 1


@pytest.mark.parametrize('token,options,status,message', [
    (None, [], 1, 'there is no token: run `hf auth login`, or set HF_TOKEN; nothing was created'),
    ('hf_unknown', [], 1, 'does not accept the token; nothing was created'),
    ('hf_reader', [], 1, 'the token may only read: make one that may write; nothing was created'),
    ('hf_stranger', [], 1, '--repo-id must be of eve or an organisation of theirs, got timm-smpconv/smpconv_mobile31.in1k'),
    (None, ['--dry-run'], 0, 'nothing was done'),
])
def test_publishing_nothing(hub, folder, python, token, options, status, message):
    result = publish(python, folder[0], MOBILE, *options, token=token)
    assert result.returncode == status and message in result.stdout + result.stderr, result.stderr
    assert len(result.stderr.splitlines()) <= 1 and not hub.exists(MOBILE)


def test_publishing_privately_again_and_after_an_error(hub, folder, python):
    hub.fail('POST', '/commit/main', 500, times=100)
    failed = publish(python, folder[0], MOBILE, '--private')
    assert failed.returncode == 1 and 'did not do it' in failed.stderr
    hub.repair()
    for _ in range(2):
        result = publish(python, folder[0], MOBILE, '--private')
        assert result.returncode == 0, result.stderr
    assert hub.repositories[MOBILE].private
    assert set(hub.files(MOBILE)) == {'.gitattributes', *convert.FILES}
    hub.repositories.clear()


@pytest.mark.parametrize('path,repo,message', [
    ('nowhere', MOBILE, 'DIR must be a folder that weights/convert.py wrote'),
    (None, 'no namespace', "--repo-id must be ORG/NAME, got 'no namespace'"),
    (None, 'name', "--repo-id must be ORG/NAME, got 'name'"),
])
def test_bad_arguments_of_publish(folder, path, repo, message, capsys):
    import publish
    assert publish.main([str(path or folder[0]), '--repo-id', repo, '--dry-run']) == 1
    assert message in capsys.readouterr().err


def test_a_checkpoint_of_train_py(tmp_path, capsys):
    """Its classes, channels and evaluation settings; EMA weights unless told otherwise; twice the same folder."""
    sd = {'model': {}, 'ema': {}}
    for seed, kind in enumerate(sd):
        torch.manual_seed(seed)
        sd[kind] = timm.create_model('smpconv_mobile31', num_classes=7, in_chans=1).state_dict()
    settings = argparse.Namespace(img_size=64, input_size=None, crop_pct=0.95, mean=None, std=None, interpolation='')
    torch.save({'state_dict': sd['model'], 'state_dict_ema': sd['ema'], 'args': settings}, tmp_path / 'last.pth.tar')
    command = [str(tmp_path / 'last.pth.tar'), '--model', 'smpconv_mobile31', '--tag', 'mine', '--out', str(tmp_path / 'out')]
    for options, kind in (([], 'ema'), ([], 'ema'), (['--weights', 'model'], 'model')):
        assert convert.main(command + options) == 0
        model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
        x = image(channels=1)
        with torch.inference_mode():
            expected = logits(in_authors_layout(sd[kind]), 'smpconv_mobile31', x)
            assert difference(model(x), expected) < 1e-5
        assert tuple(model.pretrained_cfg['input_size']) == (1, 64, 64) and model.pretrained_cfg['crop_pct'] == 0.95
    header = yaml.safe_load((tmp_path / 'out' / 'README.md').read_text().split('---\n')[1])
    assert header['library_name'] == 'timm' and 'license' not in header and 'datasets' not in header
    assert sorted(path.name for path in tmp_path.iterdir()) == ['last.pth.tar', 'out']


def without(sd, key):
    return {k: v for k, v in sd.items() if k != key}


@pytest.mark.parametrize('change,options,message', [
    (lambda sd: without(sd, 'norm.weight'), [], 'exactly the keys of the model, got 1 missing'),
    (lambda sd: dict(sd, more=torch.ones(1)), [], 'got 1 extra (more)'),
    (lambda sd: without(sd, 'head.weight'), [], 'must hold an SMPConv model with its classifier'),
    (lambda sd: without(sd, 'head.bias'), [], 'head.fc.bias'),
    (lambda sd: dict(sd, **{'norm.running_var': -sd['norm.running_var']}), [], 'the logits must differ by at most'),
    (lambda sd: dict(sd, **{k: sd[k][:5] for k in ('head.weight', 'head.bias')}), [], 'give weights for other classes another'),
    (lambda sd: {'model': sd}, ['--weights', 'ema'], "weights must be 'model' for a checkpoint without"),
    (lambda sd: sd, ['--model', 'smpconv_mobile51'], 'instead of'),
    (None, [], 'must be an existing checkpoint'),
    ('text', [], 'must hold weights alone'),
])
def test_nothing_is_left_of_a_checkpoint_that_cannot_be_converted(folder, change, options, message, tmp_path, capsys):
    file = tmp_path / 'bad.pth'
    if change == 'text':
        file.write_text('text')
    elif change:
        torch.save(change(folder[1]), file)
    before = sorted(tmp_path.iterdir())
    assert convert.main([str(file), '--model', 'smpconv_mobile31', '--out', str(tmp_path / 'out'), *options]) == 1
    assert message in capsys.readouterr().err and sorted(tmp_path.iterdir()) == before


def test_other_files_are_not_replaced(folder, tmp_path, capsys):
    (tmp_path / 'notes.txt').write_text('mine')
    assert convert.main([str(folder[0] / 'model.safetensors'), '--model', 'smpconv_mobile31', '--out', str(tmp_path)]) == 1
    assert '--out must not exist, or be a folder with nothing but' in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ['notes.txt']


@pytest.mark.parametrize('name', MODELS)
def test_sources_list_what_can_be_recomputed(name):
    entry = sources.load_sources()[f'{name}.in1k']
    model = timm.create_model(name, device='meta').eval()
    assert (entry['model'], entry['tag']) == (name, 'in1k') and entry['recipe'] in recipe_names()
    assert entry['parameters'] == sum(p.numel() for p in model.parameters())
    assert entry['tensors'] == len(model.state_dict()) and entry['gmacs'] == round(macs(model, 224) / 1e9, 3)
    cfg = timm.get_pretrained_cfg(name)
    for key, value in entry['evaluation'].items():
        assert getattr(cfg, key) == (tuple(value) if isinstance(value, list) else value)
    assert entry['license'] == cfg.license and entry['hub_id'] == f'{pretrained.NAMESPACE}/{name}.in1k'
    assert cfg.hf_hub_id == (entry['hub_id'] if entry['origin'] or entry['sha256'] else None)


def test_sources_and_the_package_agree_on_what_was_published():
    entries = sources.load_sources()
    assert sorted(entries) == sorted(f'{name}.in1k' for name in MODELS)
    assert pretrained.SHA256 == {name: entry['sha256'] for name, entry in entries.items() if entry['sha256']}


def test_recording_keeps_everything_else(tmp_path):
    path = tmp_path / 'sources.yaml'
    shutil.copy(ROOT / 'weights' / 'sources.yaml', path)
    expected = sources.load_sources(path)
    values = {'sha256': 'a1', 'commit': 'b2', 'origin.sha256': 'c3'}
    sources.record(path, 'smpconv_base.in1k', values)
    expected['smpconv_base.in1k'].update(sha256='a1', commit='b2')
    expected['smpconv_base.in1k']['origin']['sha256'] = 'c3'
    assert sources.load_sources(path) == expected
    before, after = ((ROOT / 'weights' / 'sources.yaml').read_text().splitlines(), path.read_text().splitlines())
    assert len(before) == len(after) and sum(a != b for a, b in zip(before, after)) == 3
    for name, key in (('smpconv_mobile31.in1k', 'origin.sha256'), ('nobody', 'sha256'), ('smpconv_base.in1k', 'nothing')):
        with pytest.raises(KeyError):
            sources.record(path, name, {'sha256': 'd4', key: 'e5'})
    assert sources.load_sources(path) == expected
