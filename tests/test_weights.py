"""From an authors' checkpoint to `pretrained=True`, by the real client and a Hub on loopback, in separate processes."""
import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import convert
import huggingface_hub
import pytest
import sources
import timm
import torch
import yaml
from card import model_card
from conftest import MODELS, TOKENS, difference
from hub_server import HubServer, Repository
from reference import authors_state_dict, in_authors_layout, logits
from safetensors.torch import save_file
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
    sd = authors_state_dict('smpconv_mobile31')
    return converted(tmp_path_factory.mktemp('mobile'), sd, '--merged'), sd


@pytest.fixture
def published(hub, folder, python):
    """mobile31 on the Hub, at its place; the test may change that."""
    result = publish(python, folder[0], MOBILE)
    assert result.returncode == 0, result.stderr
    yield
    hub.repair()
    hub.repositories.clear()


def unpublished(path):
    """A copy of sources.yaml as it was before anything was published."""
    text = (ROOT / 'weights' / 'sources.yaml').read_text()
    path.write_text(re.sub(r'^( *)(sha256|commit): \S+$', r'\1\2: null', text, flags=re.MULTILINE))
    return path


def converted(tmp_path, sd, *options, model='smpconv_mobile31', name='out'):
    """The folder that convert.py makes of a checkpoint of the authors."""
    file = save_as_the_authors_do(tmp_path / f'{name}.pth.tar', ema=sd)
    listed = unpublished(tmp_path / 'sources.yaml')
    out = tmp_path / name
    assert convert.main([file, '--model', model, '--out', str(out), '--sources', str(listed), *options]) == 0
    return out


def publish(python, path, repo, *options, token='hf_writer'):
    """By the sources.yaml beside it."""
    return python(
        ROOT / 'weights' / 'publish.py', path, '--repo-id', repo, '--sources', path.parent / 'sources.yaml', *options,
        token=token)


LOAD = '''
import sys
import timm, torch
import timm_smpconv
from timm_smpconv import pretrained
from timm_smpconv.checkpoint import checkpoint_filter_fn
x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
pretrained.BUILT_IN.update(dict.fromkeys(pretrained.BUILT_IN))  # whatever was published

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
    listed = unpublished(tmp_path / 'sources.yaml')
    result = python(
        ROOT / 'weights' / 'convert.py', file, '--model', 'smpconv_tiny', '--out', out, '--sources', listed)
    assert result.returncode == 0, result.stderr
    result = publish(python, out, TINY)
    assert result.returncode == 0, result.stderr
    files = hub.files(TINY)
    assert {name: files[name] for name in sources.FILES} == {p.name: p.read_bytes() for p in out.iterdir()}
    entry = sources.load_sources(listed)['smpconv_tiny.in1k']
    assert entry['sha256'] == hashlib.sha256(files['model.safetensors']).hexdigest()
    assert entry['commit'] == hub.repositories[TINY].branches['main'] and entry['commit'] in result.stdout
    code = f'''
for name in ("smpconv_tiny", "smpconv_tiny.in1k", "hf-hub:{TINY}", "local-dir:{out}"):
    found.append(tried(name))
with torch.inference_mode():
    found.append(torch.hub.load({str(ROOT)!r}, "smpconv_tiny", source="local", pretrained=True).eval()(x))
    model = timm.create_model("smpconv_tiny", pretrained=True, num_classes=5, in_chans=1).eval()
    found.append(model.get_classifier().out_features)
    found.append(model.forward_features(x.mean(1, keepdim=True)))
    found.append(timm.create_model("smpconv_tiny", pretrained=True, features_only=True).eval()(x))
    found.append(timm.list_models("smpconv*", pretrained=True))
'''
    found = load(python, tmp_path, code)
    expected = logits(sd, 'smpconv_tiny', image())
    assert all(torch.equal(found[0], found[i]) for i in range(1, 5)) and difference(found[0], expected) < 1e-5
    gray = dict(sd, **{'stem.0.conv.weight': sd['stem.0.conv.weight'].sum(1, keepdim=True)})  # as timm adapts it
    model = timm.create_model('smpconv_tiny', in_chans=1, num_classes=0).eval()
    model.load_state_dict(checkpoint_filter_fn(without_classifier(gray), model))
    with torch.inference_mode():
        assert found[5] == 5 and difference(found[6], model.forward_features(image().mean(1, keepdim=True))) < 1e-5
    assert [f.shape[1:] for f in found[7]] == [(96, 16, 24), (192, 8, 12), (384, 4, 6), (768, 2, 3)]
    assert found[8] == ['smpconv_base.in1k', 'smpconv_tiny.in1k']
    assert hub.count('GET', 'model.safetensors') == 2  # to verify, and once for all that followed

    before = len(hub.requests)
    offline = load(
        python, tmp_path, 'found += [tried("smpconv_tiny"), tried("smpconv_tiny", cache_dir="empty")]',
        HF_HUB_OFFLINE='1')
    assert torch.equal(offline[0], found[0]) and len(hub.requests) == before
    assert 'could not download the weights' in offline[1] and 'in the cache empty' in offline[1]


def without_classifier(sd):
    return {k: v for k, v in sd.items() if k not in ('head.weight', 'head.bias')}


def test_a_second_revision_and_a_merged_repository(hub, published, folder, python, tmp_path):
    sd = authors_state_dict('smpconv_mobile31', seed=2)
    result = publish(python, converted(tmp_path, sd), MOBILE, '--revision', 'retrained')
    assert result.returncode == 0 and 'not recorded' in result.stdout, result.stderr
    result = publish(python, folder[0].with_name('out-merged'), 'alice/merged')
    assert result.returncode == 0 and 'not recorded' in result.stdout, result.stderr
    repos = f'{MOBILE}@retrained', MOBILE, 'alice/merged'
    code = f'''
found += [tried("hf-hub:" + repo) for repo in {repos}]
with torch.inference_mode():
    for repo in {repos[1:]}:
        found.append(timm.create_model("hf-hub:" + repo, pretrained=True, features_only=True).eval()(x))
'''
    *found, features, merged = load(python, tmp_path, code)
    assert all(difference(a, b) < 1e-5 for a, b in zip(merged, features, strict=True))
    for state, actual in zip((sd, folder[1], folder[1]), found, strict=True):
        assert difference(actual, logits(state, 'smpconv_mobile31', image())) < 1e-5


def test_a_download_that_is_cut_and_one_that_fails_at_first(hub, published, python, tmp_path):
    hub.cut('.safetensors', 1000, times=20)
    (cut,) = load(python, tmp_path, f'found.append({MOBILE_FROM_HUB})')
    assert 'could not download the weights' in cut and not list(tmp_path.glob('cache/hub/*/snapshots/*/*'))
    hub.repair()
    hub.fail('HEAD', '.safetensors', 500)
    again = load(python, tmp_path, f'found += [{MOBILE_FROM_HUB}, {MOBILE_FROM_HUB}]')
    expected = logits(authors_state_dict('smpconv_mobile31'), 'smpconv_mobile31', image())
    assert difference(again[1], expected) < 1e-5
    if not huggingface_hub.__version__.startswith('0.'):  # which does not try again by itself
        assert torch.equal(*again)


def test_a_file_that_is_not_the_published_one(hub, published, folder, python, tmp_path):
    data = bytearray(hub.files(MOBILE)['model.safetensors'])
    data[-1000] ^= 1
    hub.alter(MOBILE, 'model.safetensors', bytes(data))
    (spoilt,) = load(python, tmp_path, f'found.append({MOBILE_FROM_HUB})')
    assert 'must have the announced sha256' in spoilt and 'It was removed from the cache' in spoilt
    assert not [path for path in tmp_path.glob('cache/hub/*/*/**/*') if path.stat().st_size > 1e6]
    hub.alter(MOBILE, 'model.safetensors', (folder[0] / 'model.safetensors').read_bytes())
    code = f'''
found.append({MOBILE_FROM_HUB})
pretrained.BUILT_IN["smpconv_mobile31.in1k"] = "0" * 64
found.append({MOBILE_FROM_HUB})
found.append(tried("hf-hub:{MOBILE}"))
'''
    good, refused, named = load(python, tmp_path, code)
    assert torch.equal(good, named) and f'must have the sha256 {"0" * 64} that' in refused


def test_what_is_not_there_or_not_allowed(hub, published, python, tmp_path):
    hub.repositories[MOBILE].private = True
    code = f'found += [tried("smpconv_base"), {MOBILE_FROM_HUB}, tried("smpconv_mobile51")]'
    missing, private, never = load(python, tmp_path, code)
    for message, repo in ((missing, 'timm-smpconv/smpconv_base.in1k'), (private, MOBILE)):
        assert f'tried model.safetensors of {repo} at {hub.url} and in the cache {tmp_path}' in message
        for way in ('weights/publish.py', 'local-dir:DIR', 'pretrained_cfg_overlay=dict(file='):
            assert way in message
    assert never.startswith('there are no weights of smpconv_mobile51: the authors published none. Train it')
    hub.repositories[TINY] = Repository(private=False)  # what is left where a first commit failed
    hub.repositories[TINY].commit('main', 'nothing', {})
    code = f'found += [{MOBILE_FROM_HUB}, tried("smpconv_base"), tried("smpconv_tiny")]'
    allowed, missing, empty = load(python, tmp_path, code, token='hf_reader')
    assert isinstance(allowed, torch.Tensor) and '404' in missing and 'could not download the weights' in missing
    assert 'could not download the weights' in empty and 'weights/publish.py' in empty


def test_two_processes_at_once(hub, published, python, tmp_path):
    before = hub.count('GET', 'model.safetensors')
    code = LOAD.replace('{}', f'found.append({MOBILE_FROM_HUB})').replace("'found.pth'", 'sys.argv[1]')
    processes = [python('-c', code, f'{i}.pth', wait=False) for i in range(2)]
    for process in processes:
        assert finished(process).returncode == 0
    one, two = (torch.load(tmp_path / f'{i}.pth')[0] for i in range(2))
    assert torch.equal(one, two) and hub.count('GET', 'model.safetensors') - before >= 1
    assert len([path for path in tmp_path.glob('cache/hub/*/blobs/*') if path.stat().st_size > 1e6]) == 1


@pytest.mark.parametrize('token,options,status,message', [
    (None, [], 1, 'there is no token: run `hf auth login`, or set HF_TOKEN; nothing was created'),
    ('hf_unknown', [], 1, 'does not accept the token; nothing was created'),
    ('hf_reader', [], 1, 'the token may only read: make one that may write; nothing was created'),
    (
        'hf_stranger', [], 1,
        '--repo-id must be of eve or an organisation of theirs, got timm-smpconv/smpconv_mobile31.in1k'),
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
    assert set(hub.files(MOBILE)) == {'.gitattributes', *sources.FILES}
    hub.repositories[MOBILE].private = False
    result = publish(python, folder[0], MOBILE, '--private')
    assert result.returncode == 1 and 'which is public' in result.stderr
    hub.repositories.clear()


def test_what_cannot_be_recorded_is_said(server, folder, tmp_path, monkeypatch, capsys):
    import publish

    def fails(*args):
        raise OSError('the disk is full')

    monkeypatch.setenv('HF_TOKEN', 'hf_writer')
    monkeypatch.setattr(publish, 'record', fails)
    listed = str(unpublished(tmp_path / 'sources.yaml'))
    assert publish.main([str(folder[0]), '--repo-id', MOBILE, '--sources', listed]) == 1
    assert 'it is published, but --sources could not be written: the disk is full' in capsys.readouterr().err
    assert server.files(MOBILE)['model.safetensors'] == (folder[0] / 'model.safetensors').read_bytes()


def spoilt(folder, change):
    if change == 'config.json':
        (folder / change).write_text('{}')
    elif change == 'model.safetensors':
        data = bytearray((folder / change).read_bytes())
        data[-1] ^= 1
        (folder / change).write_bytes(data)
    elif change:
        (folder / change).unlink()


@pytest.mark.parametrize('source,change,repo,message', [
    ('out', 'README.md', MOBILE, 'DIR must be a folder that weights/convert.py wrote, got .* without README.md'),
    ('out', 'config.json', MOBILE, "DIR must be .* with another config.json: KeyError 'architecture'"),
    ('out', 'model.safetensors', MOBILE, 'with a model.safetensors that is not the one of its config.json'),
    ('out', None, 'no namespace', "--repo-id must be ORG/NAME, got 'no namespace'"),
    ('out', None, 'name', "--repo-id must be ORG/NAME, got 'name'"),
    ('out', None, TINY, f'--repo-id {TINY} is the place of smpconv_tiny.in1k, unmerged; got a folder of other weights'),
    ('out-merged', None, MOBILE, f'--repo-id {MOBILE} is the place of smpconv_mobile31.in1k, unmerged; got'),
])
def test_bad_arguments_of_publish(folder, source, change, repo, message, tmp_path, capsys):
    import publish
    path = tmp_path / 'folder'
    shutil.copytree(folder[0].with_name(source), path)
    spoilt(path, change)
    assert publish.main([str(path), '--repo-id', repo, '--dry-run']) == 1
    assert re.search(message, capsys.readouterr().err)


def test_a_card_that_the_hub_refuses(hub, folder, python, tmp_path):
    path = tmp_path / 'folder'
    shutil.copytree(folder[0], path)
    (path / 'README.md').write_text('---\nlicense: mine\n---\n')
    unpublished(tmp_path / 'sources.yaml')
    result = publish(python, path, MOBILE)
    assert result.returncode == 1 and 'must be a model card that the Hub accepts' in result.stderr
    assert set(hub.files(MOBILE)) == {'.gitattributes'}
    hub.repositories.clear()


def test_a_checkpoint_of_train_py(tmp_path, capsys):
    """Its classes, channels and evaluation settings; EMA weights unless told otherwise; twice the same folder."""
    sd = {'model': {}, 'ema': {}}
    for seed, kind in enumerate(sd):
        torch.manual_seed(seed)
        sd[kind] = timm.create_model('smpconv_mobile31', num_classes=7, in_chans=1).state_dict()
    settings = argparse.Namespace(img_size=64, input_size=None, crop_pct=0.95, mean=None, std=None, interpolation='')
    torch.save({'state_dict': sd['model'], 'state_dict_ema': sd['ema'], 'args': settings}, tmp_path / 'last.pth.tar')
    command = [
        str(tmp_path / 'last.pth.tar'), '--model', 'smpconv_mobile31', '--tag', 'mine', '--out', str(tmp_path / 'out')]
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
    (lambda sd: dict(sd, **{k: sd[k][:5] for k in ('head.weight', 'head.bias')}), [], 'give weights for other'),
    (lambda sd: dict(sd, **{'head.fc.weight': sd['head.weight'] * 0}), [], 'got head.fc.weight under two names'),
    (lambda sd: dict(sd, **{'head.weight': 3}), [], 'must hold an SMPConv model with its classifier'),
    (lambda sd: {'model': sd}, ['--weights', 'ema'], "weights must be 'model' for a checkpoint without"),
    (lambda sd: sd, ['--model', 'smpconv_mobile51'], 'instead of'),
    (None, [], 'file must exist'),
    ('text', [], 'must be an undamaged weights-only checkpoint'),
])
def test_nothing_is_left_of_a_checkpoint_that_cannot_be_converted(folder, change, options, message, tmp_path, capsys):
    file = tmp_path / 'bad.pth'
    if change == 'text':
        file.write_text('text')
    elif change:
        torch.save(change(folder[1]), file)
    before = sorted(tmp_path.iterdir())
    out = str(tmp_path / 'new' / 'out')
    assert convert.main([str(file), '--model', 'smpconv_mobile31', '--out', out, *options]) == 1
    assert message in capsys.readouterr().err and sorted(tmp_path.iterdir()) == before


def test_only_its_own_folders_are_replaced(folder, tmp_path, capsys):
    (tmp_path / 'README.md').write_text('mine')
    weights = str(folder[0] / 'model.safetensors')
    for out in (tmp_path, folder[0]):
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        assert convert.main([weights, '--model', 'smpconv_mobile31', '--tag', 'mine', '--out', str(out)]) == 1
        assert '--out must not exist, be empty, or be a folder that this script wrote' in capsys.readouterr().err
        assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_failure_in_the_middle_of_replacing_puts_everything_back(folder, tmp_path, monkeypatch, capsys):
    out = converted(tmp_path, folder[1], '--merged')
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob('*')) if path.is_file()}
    replace, calls = os.replace, []

    def fails(source, target):
        calls.append(target)
        if len(calls) == 4:  # the second new folder into its place
            raise OSError('the disk is full')
        replace(source, target)

    monkeypatch.setattr(os, 'replace', fails)
    command = [
        str(tmp_path / 'out.pth.tar'), '--model', 'smpconv_mobile31', '--tag', 'mine', '--out', str(out), '--merged']
    assert convert.main(command) == 1 and 'the disk is full' in capsys.readouterr().err
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob('*')) if path.is_file()} == before


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_checkpoints_of_other_dtypes(folder, dtype, tmp_path):
    sd = {k: v.to(dtype) if v.is_floating_point() else v for k, v in folder[1].items()}
    model = timm.create_model(f'local-dir:{converted(tmp_path, sd)}', pretrained=True).eval()
    wide = {k: v.float() if v.is_floating_point() else v for k, v in sd.items()}
    with torch.inference_mode():
        assert difference(model(image()), logits(wide, 'smpconv_mobile31', image())) < 1e-5


@pytest.mark.parametrize('weights,known,words', [
    ('ema', None, "82.5 as published for the authors' checkpoint .*; that this is it was not verified"),
    ('ema', 'right', "82.5 as published for the authors' checkpoint .*; not measured again"),
    ('ema', '0' * 64, 'not measured for these weights; 82.5'),
    ('model', 'right', 'not measured for these weights; 82.5'),
])
def test_the_card_gives_published_accuracy_to_published_weights_alone(weights, known, words):
    entry = sources.load_sources()['smpconv_tiny.in1k']
    entry['origin']['sha256'] = known
    facts = dict(
        published=convert.is_published(entry, True, weights, 'right'), merged=False, parameters=1, origin='here',
        num_classes=1000, input_size=(3, 224, 224), difference=1e-7)
    assert re.search(words, model_card('smpconv_tiny', 'in1k', entry, facts))


def test_own_weights_need_a_tag_of_their_own(tmp_path, capsys):
    save_file(timm.create_model('smpconv_tiny').state_dict(), tmp_path / 'mine.safetensors')
    command = [str(tmp_path / 'mine.safetensors'), '--model', 'smpconv_tiny', '--out', str(tmp_path / 'out')]
    assert convert.main(command) == 1
    assert 'give weights of your own another --tag' in capsys.readouterr().err and not (tmp_path / 'out').exists()


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
    listed = {name: entry['sha256'] for name, entry in entries.items() if entry['origin'] or entry['sha256']}
    assert listed == pretrained.BUILT_IN


def test_recording_keeps_everything_else(tmp_path):
    path = unpublished(tmp_path / 'sources.yaml')
    original = path.read_text()
    expected = sources.load_sources(path)
    values = {'sha256': 'a1', 'commit': 'b2'}
    sources.record(path, 'smpconv_base.in1k', values)
    expected['smpconv_base.in1k'].update(values)
    assert sources.load_sources(path) == expected
    before, after = original.splitlines(), path.read_text().splitlines()
    assert len(before) == len(after) and sum(a != b for a, b in zip(before, after)) == 2
    for name, key in (('nobody', 'sha256'), ('smpconv_base.in1k', 'nothing')):
        with pytest.raises(KeyError):
            sources.record(path, name, {'sha256': 'd4', key: 'e5'})
    assert sources.load_sources(path) == expected
