"""From an authors' checkpoint to `pretrained=True`, by the real client and a Hub on loopback.

Oracles: tests/reference.py, and the files that were written before. The slow tests use a process per step.
"""
import argparse
import ast
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from itertools import starmap
from pathlib import Path

import convert
import huggingface_hub
import numpy as np
import publish
import pytest
import reference_smp
import timm
import torch
import yaml
from conftest import MODELS, TOKENS, difference
from hub_server import HubServer, Repository
from huggingface_hub import constants
from PIL import Image
from reference import authors_state_dict, logits
from safetensors.torch import load_file
from test_authors_networks import double
from test_checkpoint import save_as_the_authors_do
from test_models import macs

from timm_smpconv import SMPConvNet
from timm_smpconv._errors import DataError
from timm_smpconv.tools.authors_weights import authors_imagenet, authors_smp, conversion
from timm_smpconv.tools.authors_weights.card import model_card, with_address
from timm_smpconv.training.recipes import recipe_names
from timm_smpconv.weights import hub as pretrained
from timm_smpconv.weights.checkpoint import checkpoint_filter_fn

reads_folders = pytest.mark.skipif(
    tuple(map(int, timm.__version__.split('.')[:3])) < (1, 0, 26),
    reason="'local-dir:' reads no .safetensors file before timm 1.0.26")

ROOT = Path(__file__).parents[2]
TINY, MOBILE = 'timm-smpconv/smpconv_tiny.in1k', 'timm-smpconv/smpconv_mobile31.in1k'


@pytest.fixture(scope='module')
def hub():
    with HubServer(TOKENS) as hub:
        yield hub


@pytest.fixture
def python(hub, tmp_path):
    """Run code or a script in a process that knows this Hub only, with an empty cache unless the test gives one."""
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


@pytest.fixture(scope='session', autouse=True)
def small_images():
    """Conversions in this process are verified with one small input."""
    def size(model):
        height, width = model.pretrained_cfg['input_size'][1:]
        return [(32, 64) if isinstance(model, SMPConvNet) else (height, min(width, 2000))]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, 'sizes', size)
        yield


@pytest.fixture(scope='session')
def folder(tmp_path_factory, small_images):
    """What convert.py makes of mobile31 in the authors' layout, and the state dict it was made of."""
    sd = authors_state_dict('smpconv_mobile31')
    return converted(tmp_path_factory.mktemp('mobile'), sd, '--merged'), sd


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of that folder and of the merged one, at OUT and OUT-merged, with its checkpoint OUT.pth.tar."""
    shutil.copytree(folder[0].parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / 'out'


@pytest.fixture
def publishing(server, monkeypatch, tmp_path, capfd):
    """Run publish.py in this process: (status, output, errors)."""
    def publishing(path, repo, *options, token='hf_writer'):
        monkeypatch.setenv('HF_TOKEN', token) if token else monkeypatch.delenv('HF_TOKEN', raising=False)
        monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'no token'))
        sources = str(path.parent / 'sources.yaml')
        status = publish.main([str(path), '--repo-id', repo, '--sources', sources, *options])
        return status, *capfd.readouterr()
    return publishing


@pytest.fixture
def published(hub, folder, python):
    """mobile31 on the Hub, in its repository; the test may change that."""
    result = publish_in_process(python, folder[0], MOBILE)
    assert result.returncode == 0, result.stderr
    yield
    hub.repair()
    hub.repositories.clear()


def unpublished(path):
    """A copy of sources.yaml as it was before anything was published."""
    text = pretrained.SOURCES.read_text(encoding='utf-8')
    text = re.sub(r'^( *)(bytes|sha256|commit): \S+$', r'\1\2: null', text, flags=re.MULTILINE)
    path.write_text(text, encoding='utf-8')
    return path


def converted(tmp_path, sd, *options, model='smpconv_mobile31', name='out'):
    """The folder that convert.py makes of a checkpoint of the authors."""
    file = save_as_the_authors_do(tmp_path / f'{name}.pth.tar', ema=sd)
    listed = unpublished(tmp_path / 'sources.yaml')
    out = tmp_path / name
    assert convert.main([file, '--model', model, '--out', str(out), '--sources', str(listed), *options]) == 0
    return out


def publish_in_process(python, path, repo, *options, token='hf_writer'):
    """By the sources.yaml beside it."""
    return python(
        ROOT / 'weights' / 'publish.py', path, '--repo-id', repo, '--sources', path.parent / 'sources.yaml', *options,
        token=token)


LOAD = '''
import sys
import timm, torch
import timm_smpconv
from timm_smpconv.weights import hub as pretrained
from timm_smpconv.weights.checkpoint import checkpoint_filter_fn
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


@pytest.mark.slow
@reads_folders
def test_convert_publish_and_load_in_every_way(hub, python, tmp_path):
    sd = authors_state_dict('smpconv_tiny')
    file = save_as_the_authors_do(tmp_path / 'SMPConv_T.pth', ema=sd, model=authors_state_dict('smpconv_tiny', seed=1))
    out = tmp_path / 'tiny'
    listed = unpublished(tmp_path / 'sources.yaml')
    result = python(
        ROOT / 'weights' / 'convert.py', file, '--model', 'smpconv_tiny', '--out', out, '--sources', listed)
    assert result.returncode == 0, result.stderr
    result = publish_in_process(python, out, TINY)
    assert result.returncode == 0, result.stderr
    files = hub.files(TINY)
    assert {name: files[name] for name in pretrained.FILES} == {p.name: p.read_bytes() for p in out.iterdir()}
    sha256, commit = hashlib.sha256(files['model.safetensors']).hexdigest(), hub.repositories[TINY].branches['main']
    assert f'entry smpconv_tiny.in1k of {listed}:\n  sha256: {sha256}\n  commit: {commit}\n' in result.stdout
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
    assert found[8] == sorted(name for name, entry in pretrained.load_sources().items() if entry['sha256'])
    assert hub.count('GET', 'model.safetensors') == 2  # to verify, and once for all that followed

    before = len(hub.requests)
    offline = load(
        python, tmp_path, 'found += [tried("smpconv_tiny"), tried("smpconv_tiny", cache_dir="empty")]',
        HF_HUB_OFFLINE='1')
    assert torch.equal(offline[0], found[0]) and len(hub.requests) == before
    assert 'could not download the weights' in offline[1] and 'in the cache empty' in offline[1]


def without_classifier(sd):
    return {k: v for k, v in sd.items() if k not in ('head.weight', 'head.bias')}


@pytest.mark.slow
def test_a_second_revision_and_a_merged_repository(hub, published, folder, python, tmp_path):
    sd = authors_state_dict('smpconv_mobile31', seed=2)
    result = publish_in_process(python, converted(tmp_path, sd), MOBILE, '--revision', 'retrained')
    assert result.returncode == 0 and 'does not list revision retrained' in result.stdout, result.stderr
    result = publish_in_process(python, folder[0].with_name('out-merged'), 'alice/merged')
    assert result.returncode == 0 and 'does not list revision main' in result.stdout, result.stderr
    repos = f'{MOBILE}@retrained', MOBILE, 'alice/merged'
    code = f'''
found += [tried("hf-hub:" + repo) for repo in {repos}]
with torch.inference_mode():
    for repo in {repos[1:]}:
        found.append(timm.create_model("hf-hub:" + repo, pretrained=True, features_only=True).eval()(x))
'''
    *found, features, merged = load(python, tmp_path, code)
    differences = list(starmap(difference, zip(merged, features, strict=True)))
    assert max(differences) < 5e-5  # rounding of all layers, channel by channel; 1.4e-5 in the last stage
    for state, actual in zip((sd, folder[1], folder[1]), found, strict=True):
        assert difference(actual, logits(state, 'smpconv_mobile31', image())) < 1e-5


@pytest.mark.slow
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


@pytest.mark.slow
def test_what_is_not_there_or_not_allowed(hub, published, python, tmp_path):
    hub.repositories[MOBILE].private = True
    code = f'found += [tried("smpconv_base"), {MOBILE_FROM_HUB}, tried("smpconv_mobile51")]'
    missing, private, never = load(python, tmp_path, code)
    for message, repo in ((missing, 'timm-smpconv/smpconv_base.in1k'), (private, MOBILE)):
        assert f'tried model.safetensors of {repo} at {hub.url} and in the cache {tmp_path}' in message
        for way in ('timm-smpconv weights ', 'local-dir:DIR', 'pretrained_cfg_overlay=dict(file='):
            assert (way in message) == (repo != MOBILE)
    assert never.startswith('there are no weights of smpconv_mobile51: the authors published none. Train it')
    hub.repositories[TINY] = Repository(private=False)  # what is left where a first commit failed
    hub.repositories[TINY].commit('main', 'nothing', {})
    code = f'found += [{MOBILE_FROM_HUB}, tried("smpconv_base"), tried("smpconv_tiny")]'
    allowed, missing, empty = load(python, tmp_path, code, token='hf_reader')
    assert isinstance(allowed, torch.Tensor) and '404' in missing and 'could not download the weights' in missing
    assert 'could not download the weights' in empty and 'timm-smpconv weights smpconv_tiny' in empty


@pytest.mark.slow
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
    (None, [], 1, 'no token found: run `hf auth login` or set HF_TOKEN; nothing was created'),
    ('hf_unknown', [], 1, 'rejects the token; nothing was created'),
    ('hf_reader', [], 1, 'the token must have write access, got a read-only one; nothing was created'),
    (
        'hf_stranger', [], 2,
        '--repo-id must belong to eve or an organisation of theirs, got timm-smpconv/smpconv_mobile31.in1k'),
    (None, ['--dry-run'], 0, 'nothing was uploaded'),
])
def test_publishing_nothing(server, folder, publishing, token, options, status, message):
    found, out, err = publishing(folder[0], MOBILE, *options, token=token)
    assert found == status and message in out + err
    assert len(err.splitlines()) <= 1 and not server.exists(MOBILE)


def test_publishing_privately_again_and_after_an_error(server, folder, publishing):
    server.fail('POST', '/commit/main', 500, times=100)
    status, _, err = publishing(folder[0], MOBILE, '--private')
    assert status == 1 and f'the request to {server.url} failed' in err
    server.repair()
    for _ in range(2):
        status, _, err = publishing(folder[0], MOBILE, '--private')
        assert status == 0, err
    assert server.repositories[MOBILE].private
    assert set(server.files(MOBILE)) == {'.gitattributes', *pretrained.FILES}
    server.repositories[MOBILE].private = False
    status, _, err = publishing(folder[0], MOBILE, '--private')
    assert status == 2 and 'which is public' in err


def test_an_interrupt_of_publish(folder, publishing, monkeypatch):
    monkeypatch.setattr(publish.HfApi, 'upload_folder', lambda *args, **kwargs: interrupt())
    status, _, err = publishing(folder[0], MOBILE)
    assert status == 130 and err == '\npublish: interrupted\n'


def spoil(folder, change):
    """Delete a file, alter one, or write text or bytes into one: NAME, or (NAME, content)."""
    if change == 'model.safetensors':
        data = bytearray((folder / change).read_bytes())
        data[-1] ^= 1
        (folder / change).write_bytes(data)
    elif isinstance(change, tuple):
        (folder / change[0]).write_bytes(change[1])
    elif callable(change):
        config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
        (folder / 'config.json').write_text(json.dumps(change(config)), encoding='utf-8')
    elif change:
        (folder / change).unlink()


@pytest.mark.parametrize('source,change,repo,message', [
    ('out', 'README.md', MOBILE, 'DIR must be a folder that weights/convert.py wrote, got .* without README.md'),
    ('out', ('README.md', b'\xff\xfe'), MOBILE, 'README.md in DIR must be UTF-8'),
    ('out', ('config.json', b'{}'), MOBILE, "DIR must be .* with another config.json: KeyError 'architecture'"),
    ('out', ('config.json', b'\xff'), MOBILE, 'DIR must be .* with another config.json: UnicodeDecodeError'),
    ('out', lambda config: [config], MOBILE, 'DIR must be .* with another config.json: TypeError'),
    ('out', lambda config: dict(config, model_args=['in_chans']), MOBILE, 'with another config.json: TypeError'),
    ('out', 'model.safetensors', MOBILE, 'with a model.safetensors that does not match its config.json'),
    ('out', None, 'no namespace', "--repo-id must be ORG/NAME, got 'no namespace'"),
    ('out', None, 'name', "--repo-id must be ORG/NAME, got 'name'"),
    ('out', None, MOBILE.upper(), f'--repo-id must be {MOBILE}, as listed in sources.yaml, got {MOBILE.upper()}'),
    ('out', None, TINY, f'DIR must hold smpconv_tiny.in1k, unmerged, for --repo-id {TINY}, got'),
    ('out-merged', None, MOBILE, f'DIR must hold smpconv_mobile31.in1k, unmerged, for --repo-id {MOBILE}, got'),
])
def test_bad_arguments_of_publish(copy, source, change, repo, message, publishing):
    path = copy.with_name(source)
    spoil(path, change)
    status, _, err = publishing(path, repo, '--dry-run')
    assert status == (2 if message.startswith('--repo-id') else 1)
    assert re.search(message, err) and len(err.splitlines()) == 1


def test_a_card_that_the_hub_refuses(server, copy, publishing):
    spoil(copy, ('README.md', b'---\nlicense: mine\n---\n'))
    status, _, err = publishing(copy, MOBILE)
    assert status == 1 and 'must be a model card that the Hub accepts' in err
    assert set(server.files(MOBILE)) == {'.gitattributes'}


@pytest.mark.slow
@reads_folders
def test_a_checkpoint_of_train_py(tmp_path):
    """Its classes, channels and evaluation settings; EMA weights by default. OUT is a link to an empty folder."""
    sd = {'model': {}, 'ema': {}}
    for seed, kind in enumerate(sd):
        torch.manual_seed(seed)
        sd[kind] = timm.create_model('smpconv_mobile31', num_classes=7, in_chans=1).state_dict()
    settings = argparse.Namespace(img_size=64, input_size=None, crop_pct=0.95, mean=None, std=None, interpolation='')
    torch.save({'state_dict': sd['model'], 'state_dict_ema': sd['ema'], 'args': settings}, tmp_path / 'last.pth.tar')
    (tmp_path / 'real').mkdir()
    (tmp_path / 'out').symlink_to('real')
    command = [
        str(tmp_path / 'last.pth.tar'), '--model', 'smpconv_mobile31', '--tag', 'mine', '--out', str(tmp_path / 'out')]
    for options, kind in (([], 'ema'), (['--weights', 'model'], 'model')):
        assert convert.main(command + options) == 0
        weights = load_file(tmp_path / 'out' / 'model.safetensors')
        assert weights.keys() == sd[kind].keys() and all(torch.equal(v, sd[kind][k]) for k, v in weights.items())
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert model.get_classifier().out_features == 7
    assert tuple(model.pretrained_cfg['input_size']) == (1, 64, 64) and model.pretrained_cfg['crop_pct'] == 0.95
    header = yaml.safe_load((tmp_path / 'out' / 'README.md').read_text(encoding='utf-8').split('---\n')[1])
    assert header['library_name'] == 'timm' and 'license' not in header and 'datasets' not in header
    assert sorted(path.name for path in tmp_path.iterdir()) == ['last.pth.tar', 'out', 'real']
    assert sorted(path.name for path in (tmp_path / 'real').iterdir()) == [*pretrained.FILES]


def trained(tmp_path, name, **changes):
    """A checkpoint as the authors' trainer.py saves it, with a state dict of the oracle's."""
    sd = reference_smp.authors_state_dict(name, **changes)
    torch.save({'model': sd, 'optimizer': {}, 'lr_scheduler': {}, 'epoch': 200}, tmp_path / 'checkpoint.pt')
    return sd, [str(tmp_path / 'checkpoint.pt'), '--model', name, '--out', str(tmp_path / 'out')]


@pytest.mark.parametrize('name', [
    'smpconv_tcn_ct', 'smpconv_tcn_sc', *(pytest.param(name, marks=pytest.mark.slow) for name in (
        'smpconv_resnet_cifar10', 'smpconv_tcn_smnist', 'smpconv_tcn_pmnist', 'smpconv_tcn_scifar10',
        'smpconv_tcn_scraw'))])
@reads_folders
def test_the_cifar10_and_sequence_networks(name, tmp_path, publishing):
    """Converted, read back, merged, and published on paper; what the card says and how it loads them."""
    sd, command = trained(tmp_path, name)
    listed = unpublished(tmp_path / 'sources.yaml')
    assert convert.main([*command, '--merged', '--sources', str(listed)]) == 0
    model, merged = (
        timm.create_model(f'local-dir:{tmp_path / out}', pretrained=True).eval() for out in ('out', 'out-merged'))
    x = torch.randn(1, *model.pretrained_cfg['input_size'])[..., :2000]
    with torch.inference_mode():
        expected = reference_smp.logits(double(sd), name, x.double())
        assert difference(model(x), expected) < 1e-4 and difference(merged(x), expected) < 1e-4

    entry = pretrained.load_sources()[f'{name}.{timm.get_pretrained_cfg(name).tag}']
    card = (tmp_path / 'out' / 'README.md').read_text(encoding='utf-8')
    header = yaml.safe_load(card.split('---\n')[1])
    assert header.get('pipeline_tag') == entry['dataset']['pipeline']
    assert header.get('datasets', [None]) == [entry['dataset']['id']]
    assert f'| {entry["dataset"]["name"]} top-1 (%) | {entry["top1"]} as published for the authors' in card
    assert f'# {name}.{entry["tag"]}\n' in card and f'{entry["parameters"]:,}' in card and 'ImageNet' not in card
    code, _ = re.findall(r'```python\n(.*?)```', card, re.DOTALL)
    names = {}
    exec(with_address(code, 'DIR').replace('hf-hub:DIR', f'local-dir:{tmp_path / "out"}'), names)
    if x.shape[2] > 1:
        mode = 'L' if x.shape[1] == 1 else 'RGB'
        image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*x.shape[2:], 3), np.uint8)).convert(mode)
        pixels = torch.from_numpy(np.array(image)).reshape(*x.shape[2:], -1).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(entry['evaluation'][key]).view(-1, 1, 1) for key in ('mean', 'std'))
        assert difference(names['transform'](image), (pixels - mean) / std) < 1e-6
    else:
        assert names['logits'].shape == expected.shape

    status, out, _ = publishing(tmp_path / 'out', entry['hub_id'], '--dry-run')
    assert status == 0 and 'nothing was uploaded' in out
    status, _, err = publishing(tmp_path / 'out-merged', entry['hub_id'], '--dry-run')
    assert status == 1 and 'unmerged, for --repo-id' in err


def test_kernels_of_another_length_are_refused(tmp_path, capsys):
    """Weights of points do not show it: sMNIST and raw Speech Commands have the same shapes."""
    _, command = trained(tmp_path, 'smpconv_tcn_smnist')
    assert convert.main([*command, '--model', 'smpconv_tcn_scraw']) == 1
    assert 'train_length must be 16000, the length of the kernels of the model, got [784]' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('name,arguments,message', [
    ('smpconv_tcn_ct', {'drop_rate': 0.1, 'num_classes': 20}, None),
    ('smpconv_tcn_ct', {'seq_len': 64}, "got smpconv_tcn_ct with {'seq_len': 64}"),
    ('smpconv_tcn_smnist', None, 'must hold smpconv_tcn_ct with its own arguments, got smpconv_tcn_smnist with {}'),
])
def test_a_checkpoint_of_the_sequence_command(name, arguments, message, tmp_path, capsys):
    """As its LightningModule saves it: the state dict of timm's model, and the arguments."""
    model = timm.create_model('smpconv_tcn_ct').eval()
    settings = {'name': name, 'model_args': arguments, 'lr': 1e-4}
    torch.save({'state_dict': model.state_dict(), 'hyper_parameters': settings, 'epoch': 1}, tmp_path / 'last.ckpt')
    command = [str(tmp_path / 'last.ckpt'), '--model', 'smpconv_tcn_ct', '--tag', 'mine']
    status = convert.main([*command, '--out', str(tmp_path / 'out')])
    if message:
        assert status == 1 and message in capsys.readouterr().err
    else:
        weights = load_file(tmp_path / 'out' / 'model.safetensors')
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
        card = (tmp_path / 'out' / 'README.md').read_text(encoding='utf-8')
        assert 'license' not in card and 'top-1' not in card and 'EMA' not in card


def test_transformers_can_build_it(folder):
    """As its TimmWrapperModel does with config.json: twice the same argument is an error."""
    for out in folder[0], folder[0].with_name('out-merged'):
        config = json.loads((out / 'config.json').read_text(encoding='utf-8'))
        model = timm.create_model(config['architecture'], num_classes=config['num_classes'], **config['model_args'])
        model.load_state_dict(load_file(out / 'model.safetensors'))
        with torch.inference_mode():
            assert difference(model.eval()(image()), logits(folder[1], 'smpconv_mobile31', image())) < 5e-5


def without(sd, key):
    return {k: v for k, v in sd.items() if k != key}


STEM = 'stem.0.conv.weight'
COORDS = 'stages.0.blocks.0.large_kernel.smp.conv.weight_coord'
RADIUS = 'stages.0.blocks.0.large_kernel.smp.conv.radius'


@pytest.mark.parametrize('change,options,message', [
    (lambda sd: without(sd, 'norm.weight'), [], 'exactly the keys of the model, got 1 missing'),
    (lambda sd: dict(sd, more=torch.ones(1)), [], 'got 1 extra (more)'),
    (lambda sd: without(sd, 'head.weight'), [], 'must hold an SMPConv model with its classifier'),
    (lambda sd: without(sd, 'head.bias'), [], 'head.fc.bias'),
    (lambda sd: dict(sd, **{'norm.running_var': -sd['norm.running_var']}), [], 'the logits must differ by at most'),
    (lambda sd: dict(sd, **{k: sd[k][:5] for k in ('head.weight', 'head.bias')}), [], 'give weights for other'),
    (lambda sd: dict(sd, **{'head.fc.weight': sd['head.weight'] * 0}), [], 'got head.fc.weight under two names'),
    (lambda sd: dict(sd, **{'head.weight': 3}), [], 'must hold an SMPConv model with its classifier'),
    (lambda sd: dict(sd, **{COORDS: sd[COORDS] / 0}), [], 'must be finite everywhere'),
    (lambda sd: dict(sd, **{RADIUS: sd[RADIUS] / 0}), [], 'must be finite everywhere'),
    (lambda sd: dict(enumerate(sd.values())), [], 'must have names as keys, got 0'),
    (lambda sd: {'state_dict': {**sd, 3: sd[COORDS]}}, [], 'must have names as keys, got 3'),
    (lambda sd: dict(sd, **{STEM: sd[STEM].to(torch.int8)}), [], f'{STEM} must have a floating point dtype, got'),
    (lambda sd: dict(sd, **{STEM: sd[STEM].to(torch.complex64)}), [], f'{STEM} must have a floating point dtype, got'),
    (lambda sd: dict(sd, **{STEM: sd[STEM].to_sparse()}), [], f'{STEM} must be a dense tensor, got torch.sparse_coo'),
    (lambda sd: {'model': sd}, ['--weights', 'ema'], "weights must be 'model' for a checkpoint without"),
    (lambda sd: sd, ['--model', 'smpconv_mobile51'], 'instead of'),
    (None, [], 'file must exist'),
    ('text', [], 'must be an undamaged weights-only checkpoint'),
])
@pytest.mark.filterwarnings('ignore:Validating sparse tensor invariants')  # of torch.load
def test_nothing_is_left_of_a_checkpoint_that_cannot_be_converted(folder, change, options, message, tmp_path, capsys):
    file = tmp_path / 'bad.pth'
    if change == 'text':
        file.write_text('text')
    elif change:
        torch.save(change(folder[1]), file)
    before = sorted(tmp_path.iterdir())
    out = str(tmp_path / 'new' / 'out')
    assert convert.main([str(file), '--model', 'smpconv_mobile31', '--out', out, *options]) == 1
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1 and sorted(tmp_path.iterdir()) == before


def test_only_its_own_folders_are_replaced(folder, tmp_path, capsys):
    (tmp_path / 'README.md').write_text('mine')
    weights = str(folder[0] / 'model.safetensors')
    for out in (tmp_path, folder[0]):
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        assert convert.main([weights, '--model', 'smpconv_mobile31', '--tag', 'mine', '--out', str(out)]) == 2
        assert 'out must not exist, be empty, or be a folder that was converted' in capsys.readouterr().err
        assert before == {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize('out,message', [
    ('.', 'must not be the working directory or a mount point'),
    ('mount', 'must not be the working directory or a mount point'),
    ('file', 'must not exist, be empty, or be a folder that was converted'),
    ('file/below', 'must be a folder or a new one, got a file at'),
])
def test_folders_that_cannot_be_replaced(copy, out, message, tmp_path, monkeypatch, capsys):
    (tmp_path / 'mount').mkdir()
    (tmp_path / 'file').touch()
    monkeypatch.setattr(Path, 'is_mount', lambda path: path.name == 'mount')
    monkeypatch.chdir(tmp_path / 'mount' if out == '.' else tmp_path)
    before = sorted(tmp_path.rglob('*'))
    status = 1 if out == 'file/below' else 2
    assert convert.main([f'{copy}.pth.tar', '--model', 'smpconv_mobile31', '--out', out]) == status
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out and sorted(tmp_path.rglob('*')) == before


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def fail(*args):
    raise OSError('the disk is full')


def interrupt(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize('fault,status,said', [
    (fail, 1, 'convert: the disk is full'), (interrupt, 130, 'convert: interrupted')])
def test_an_end_in_the_middle(copy, fault, status, said, tmp_path, monkeypatch, capsys):
    before = contents(tmp_path)
    monkeypatch.setattr(conversion, 'oracle', fault)
    command = [
        f'{copy}.pth.tar', '--model', 'smpconv_mobile31', '--tag', 'mine', '--out', str(copy), '--merged',
        '--sources', str(tmp_path / 'sources.yaml')]
    assert convert.main(command) == status
    assert capsys.readouterr().err.strip() == said and contents(tmp_path) == before


def test_a_full_disk(copy, tmp_path, capsys):
    """Files may have 1 MB here."""
    before = contents(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        status = convert.main([f'{copy}.pth.tar', '--model', 'smpconv_mobile31', '--tag', 'mine', '--out', str(copy)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    err = capsys.readouterr().err
    assert status == 1 and 'convert: could not write model.safetensors: ' in err and len(err.splitlines()) == 1
    assert contents(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [
    torch.float16, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.bfloat16, torch.float64))])
@reads_folders
def test_checkpoints_of_other_dtypes(folder, dtype, tmp_path):
    sd = {k: v.to(dtype) if v.is_floating_point() else v for k, v in folder[1].items()}
    model = timm.create_model(f'local-dir:{converted(tmp_path, sd)}', pretrained=True).eval()
    wide = {k: v.float() if v.is_floating_point() else v for k, v in sd.items()}
    with torch.inference_mode():
        assert difference(model(image()), logits(wide, 'smpconv_mobile31', image())) < 1e-5


@pytest.mark.parametrize('weights,known,words', [
    ('ema', None, "82.5 as published for the authors' checkpoint .*; not verified to be that checkpoint;"),
    ('ema', 'right', "82.5 as published for the authors' checkpoint .*; not re-measured"),
    ('ema', '0' * 64, 'not measured for these weights; 82.5'),
    ('model', 'right', 'not measured for these weights; 82.5'),
])
def test_the_card_gives_published_accuracy_to_published_weights_alone(weights, known, words):
    entry = pretrained.load_sources()['smpconv_tiny.in1k']
    entry['origin']['sha256'] = known
    facts = dict(
        published=conversion.is_published(entry, True, weights, 'right'), merged=False, parameters=1, origin='here',
        num_classes=1000, input_size=(3, 224, 224), dataset=entry['dataset'], difference=1e-7)
    assert re.search(words, model_card('smpconv_tiny', 'in1k', entry, facts))


@pytest.mark.parametrize('module', [authors_imagenet, authors_smp])
def test_the_oracle_shares_no_code_with_the_package(module):
    imported = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding='utf-8'))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            assert not getattr(node, 'level', 0), 'an import from the package'
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            imported |= {name.partition('.')[0] for name in names}
    assert imported <= {'numpy', 're', 'torch', 'typing'}


def test_own_weights_need_a_tag_of_their_own():
    entry = pretrained.load_sources()['smpconv_tiny.in1k']
    with pytest.raises(DataError, match='give weights of your own another tag'):
        conversion.check_entry(entry, timm.create_model('smpconv_tiny', device='meta'), authors=False)


KEYS = (
    'model', 'tag', 'origin', 'license', 'parameters', 'gmacs', 'tensors', 'top1', 'top1_source', 'dataset',
    'evaluation', 'recipe', 'hub_id', 'sha256', 'commit')


@pytest.mark.parametrize('name', MODELS)
def test_sources_list_what_can_be_recomputed(name):
    cfg = timm.get_pretrained_cfg(name)
    entry = pretrained.load_sources()[f'{name}.{cfg.tag}']
    assert tuple(key for key in entry if key != 'input') == KEYS  # and some have that, for the card
    assert tuple(entry['dataset']) == ('name', 'id', 'pipeline')
    assert entry['origin'] is None or tuple(entry['origin']) == ('page', 'file', 'weights', 'bytes', 'sha256')
    model = timm.create_model(name, device='meta').eval()
    assert (entry['model'], entry['tag']) == (name, cfg.tag) and entry['recipe'] in recipe_names()
    assert entry['parameters'] == sum(p.numel() for p in model.parameters())
    assert entry['tensors'] == len(model.state_dict())
    assert entry['gmacs'] == round(macs(model, cfg.input_size) / 1e9, 3)
    for key, value in entry['evaluation'].items():
        assert getattr(cfg, key) == (tuple(value) if isinstance(value, list) else value)
    assert entry['license'] == cfg.license and entry['hub_id'] == f'{pretrained.NAMESPACE}/{name}.{cfg.tag}'
    assert cfg.hf_hub_id == (entry['hub_id'] if entry['sha256'] else None)  # or in the cache, where the tests have none


def test_sources_and_the_package_agree_on_what_was_published():
    entries = pretrained.load_sources()
    assert sorted(entries) == sorted(f'{name}.{timm.get_pretrained_cfg(name).tag}' for name in MODELS)
    listed = {name: entry['sha256'] for name, entry in entries.items() if entry['origin'] or entry['sha256']}
    assert listed == pretrained.BUILT_IN
