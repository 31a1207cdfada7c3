"""convert.py: folders as the Hub has them, from checkpoints of the authors, of train.py and of Lightning.

Oracles: tests/reference.py and reference_smp.py, timm's own loading of the folder, and what was on the disk before.
"""
import argparse
import ast
import io
import json
import re
import shutil
from pathlib import Path

import card
import convert
import numpy as np
import pytest
import reference_smp
import timm
import torch
import yaml
from authors_networks import imagenet, smp
from conftest import difference, full_disk, interrupt
from hub_server import Repository
from huggingface_hub import constants
from PIL import Image
from reference import authors_state_dict, logits
from safetensors.torch import load_file
from test_authors_networks import double
from test_checkpoint import save_as_the_authors_do, without

from timm_smpconv import SMPConvNet
from timm_smpconv._errors import DataError
from timm_smpconv.weights import hub

reads_folders = pytest.mark.skipif(
    tuple(map(int, timm.__version__.split('.')[:3])) < (1, 0, 26),
    reason="'local-dir:' reads no .safetensors file before timm 1.0.26")


@pytest.fixture(scope='module', autouse=True)
def small_images():
    """Conversions in this process are verified with one small input."""
    def size(model):
        height, width = model.pretrained_cfg['input_size'][1:]
        return [(32, 64) if isinstance(model, SMPConvNet) else (height, min(width, 2000))]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, 'sizes', size)
        yield


@pytest.fixture(scope='module')
def folder(tmp_path_factory, small_images):
    """What convert.py makes of mobile31 in the authors' layout, and the state dict it was made of."""
    sd = authors_state_dict('smpconv_mobile31')
    return converted(tmp_path_factory.mktemp('mobile'), sd, '--merged'), sd


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of that folder and of the merged one, at OUT and OUT-merged, with its checkpoint OUT.pth.tar."""
    shutil.copytree(folder[0].parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / 'out'


def converted(tmp_path, sd, *options, model='smpconv_mobile31', name='out'):
    """The folder that convert.py makes of a checkpoint of the authors."""
    file = save_as_the_authors_do(tmp_path / f'{name}.pth.tar', ema=sd)
    out = tmp_path / name
    assert convert.main([file, '--model', model, '--out', str(out), *options]) == 0
    return out


def image(channels=3):
    return torch.randn(1, channels, 64, 96, generator=torch.Generator().manual_seed(1))


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
    assert sorted(path.name for path in (tmp_path / 'real').iterdir()) == sorted(convert.FILES)


def trained(tmp_path, name, **changes):
    """A checkpoint as the authors' trainer.py saves it, with a state dict of the oracle's."""
    sd = reference_smp.authors_state_dict(name, **changes)
    torch.save({'model': sd, 'optimizer': {}, 'lr_scheduler': {}, 'epoch': 200}, tmp_path / 'checkpoint.pt')
    return sd, [str(tmp_path / 'checkpoint.pt'), '--model', name, '--out', str(tmp_path / 'out')]


@pytest.mark.parametrize('name', [
    'smpconv_tcn_ct', 'smpconv_tcn_sc', *(pytest.param(name, marks=pytest.mark.slow) for name in (
        'smpconv_resnet_cifar10', 'smpconv_tcn_smnist', 'smpconv_tcn_pmnist', 'smpconv_tcn_scifar10'))])
@reads_folders
def test_the_cifar10_and_sequence_networks(name, tmp_path, server, monkeypatch):
    """Converted, read back and merged; what the card says, and what its code computes."""
    sd, command = trained(tmp_path, name)
    assert convert.main([*command, '--merged']) == 0
    model, merged = (
        timm.create_model(f'local-dir:{tmp_path / out}', pretrained=True).eval() for out in ('out', 'out-merged'))
    x = torch.randn(1, *model.pretrained_cfg['input_size'])[..., :2000]
    with torch.inference_mode():
        expected = reference_smp.logits(double(sd), name, x.double())
        assert difference(model(x), expected) < 1e-4 and difference(merged(x), expected) < 1e-4

    full_name = f'{name}.{timm.get_pretrained_cfg(name).tag}'
    entry = hub.load_sources()[full_name]
    text = (tmp_path / 'out' / 'README.md').read_text(encoding='utf-8')
    header = yaml.safe_load(text.split('---\n')[1])
    assert header.get('pipeline_tag') == entry['dataset']['pipeline'] and header['license'] == 'mit'
    assert header.get('datasets', [None]) == [entry['dataset']['id']]
    assert f'| {entry["dataset"]["name"]} top-1 (%) | {entry["top1"]} as published for the authors' in text
    parameters = sum(p.numel() for p in model.parameters())
    assert f'# {full_name}\n' in text and f'| parameters | {parameters:,} |' in text and 'ImageNet' not in text

    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    image = serve_image(server, *x.shape[2:]) if x.shape[2] > 1 else None
    classify, features, embeddings, merge, *_ = snippets(
        text.replace(f'hf-hub:ORG/{full_name}', f'local-dir:{tmp_path / "out"}'))
    x = classify['x']
    if image:
        pixels = torch.from_numpy(np.array(image.convert('L' if x.shape[1] == 1 else 'RGB')))
        pixels = pixels.reshape(*x.shape[2:], -1).permute(2, 0, 1)
        mean, std = (torch.tensor(model.pretrained_cfg[key]).view(-1, 1, 1) for key in ('mean', 'std'))
        assert difference(x[0], (pixels / 255 - mean) / std) < 1e-6
    expected = reference_smp.logits(double(sd), name, x.double())
    assert difference(classify['probabilities'], expected.softmax(1)[0]) < 1e-4
    classifier = [sd[key].flatten(1) if key.endswith('weight') else sd[key] for key in sd if key.startswith(
        ('out_layer.', 'finallyr.'))]
    assert f'# (1, {embeddings["embeddings"].shape[1]})\n' in text
    of_embeddings = torch.nn.functional.linear(embeddings['embeddings'], *classifier)
    with torch.inference_mode():
        assert difference(of_embeddings, reference_smp.logits(double(sd), name, embeddings['x'].double())) < 1e-4
        assert difference(features['features'], model.forward_features(features['x'])) < 1e-4
        assert difference(merge['merged'](x), expected) < 1e-4


def serve_image(server, height, width):
    """An image of noise where timm's cards have theirs."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8))
    image.save(data := io.BytesIO(), 'png')
    repository = server.repositories['huggingface/documentation-images'] = Repository(private=False)
    repository.commit('main', 'An image', {'beignets-task-guide.png': repository.store(data.getvalue(), large=True)})
    return image


def snippets(text):
    """Run the card's blocks of Python, each by itself; yields their names."""
    for code in re.findall(r'```python\n(.*?)```', text, re.DOTALL):
        if 'transformers' not in code:
            exec(code, names := {})
            yield names


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
        text = (tmp_path / 'out' / 'README.md').read_text(encoding='utf-8')
        assert 'license' not in text and 'top-1' not in text and 'EMA' not in text
        assert 'label_names' not in config_of(tmp_path / 'out')


def config_of(folder):
    return json.loads((folder / 'config.json').read_text(encoding='utf-8'))


def test_transformers_can_build_it(folder):
    """As its TimmWrapperModel does with config.json: twice the same argument is an error."""
    for out in folder[0], folder[0].with_name('out-merged'):
        config = config_of(out)
        model = timm.create_model(config['architecture'], num_classes=config['num_classes'], **config['model_args'])
        model.load_state_dict(load_file(out / 'model.safetensors'))
        with torch.inference_mode():
            assert difference(model.eval()(image()), logits(folder[1], 'smpconv_mobile31', image())) < 5e-5


def test_classes_have_the_names_that_transformers_gives_to_other_imagenet_networks(folder):
    wrapper = pytest.importorskip('transformers').TimmWrapperConfig
    config = config_of(folder[0])
    found = wrapper.from_dict(dict(config)).id2label  # older releases take entries out
    assert found == wrapper.from_dict(without(config, 'label_names')).id2label and found[1] == config['label_names'][1]


COORDS = 'stages.0.blocks.0.large_kernel.smp.conv.weight_coord'


@pytest.mark.parametrize('change,options,message', [
    (lambda sd: without(sd, 'norm.weight'), [], 'exactly the keys of the model, got 1 missing'),
    (lambda sd: without(sd, 'head.weight'), [], 'must hold an SMPConv model with its classifier'),
    (lambda sd: dict(sd, **{'norm.running_var': -sd['norm.running_var']}), [], 'the logits must differ by at most'),
    (lambda sd: dict(sd, **{k: sd[k][:5] for k in ('head.weight', 'head.bias')}), [], 'give other weights another tag'),
    (lambda sd: dict(sd, **{COORDS: sd[COORDS] / 0}), [], 'must be finite everywhere'),
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


@pytest.mark.parametrize('fault,status,said', [
    (fail, 1, 'convert: the disk is full'), (interrupt, 130, 'convert: interrupted')])
def test_an_end_in_the_middle(copy, fault, status, said, tmp_path, monkeypatch, capsys):
    before = contents(tmp_path)
    monkeypatch.setattr(convert, 'oracle', fault)
    command = [
        f'{copy}.pth.tar', '--model', 'smpconv_mobile31', '--tag', 'mine', '--out', str(copy), '--merged']
    assert convert.main(command) == status
    assert capsys.readouterr().err.strip() == said and contents(tmp_path) == before


def test_a_full_disk(copy, tmp_path, capsys):
    before = contents(tmp_path)
    with full_disk(1_000_000):
        status = convert.main([f'{copy}.pth.tar', '--model', 'smpconv_mobile31', '--tag', 'mine', '--out', str(copy)])
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


@pytest.mark.parametrize('preferred,known,sha256,words', [
    (True, None, 'right', "82.5 as published for the authors' checkpoint .*; not verified to be that checkpoint;"),
    (True, 'right', 'right', "82.5 as published for the authors' checkpoint .*; not re-measured"),
    (True, None, None, "82.5 as published for the authors' checkpoint .*; not re-measured"),  # just downloaded
    (True, '0' * 64, 'right', 'not measured for these weights; 82.5'),
    (False, 'right', 'right', 'not measured for these weights; 82.5'),
    (False, None, None, 'not measured for these weights; 82.5'),
])
def test_the_card_gives_published_accuracy_to_published_weights_alone(preferred, known, sha256, words):
    entry = hub.load_sources()['smpconv_tiny.in1k']
    entry['origin']['sha256'] = known
    facts = dict(
        published=convert.is_published(entry, preferred, sha256), merged=False, parameters=1, origin='here',
        num_classes=1000, num_features=1, input_size=(3, 224, 224), dataset=entry['dataset'], difference=1e-7,
        license='mit', labels=True)
    assert re.search(words, card.model_card('smpconv_tiny', 'in1k', entry, facts))


@pytest.mark.parametrize('module', [imagenet, smp])
def test_the_authors_networks_share_no_code_with_the_package(module):
    imported = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding='utf-8'))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            assert not getattr(node, 'level', 0), 'an import from the package'
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            imported |= {name.partition('.')[0] for name in names}
    assert imported <= {'numpy', 're', 'torch', 'typing'}


def test_own_weights_need_a_tag_of_their_own():
    entry = hub.load_sources()['smpconv_tiny.in1k']
    with pytest.raises(DataError, match='give weights of your own another tag'):
        convert.check_entry('smpconv_tiny.in1k', entry, timm.create_model('smpconv_tiny', device='meta'), authors=False)
