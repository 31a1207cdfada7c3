"""Checkpoints of the authors against the oracle network, every way to load one, and every way in which one is bad."""
import argparse
import os

import pytest
import timm
import torch
from conftest import IMAGENET_MODELS, difference, small_model
from reference import authors_state_dict, logits
from safetensors.torch import save_file

from timm_smpconv import CheckpointError
from timm_smpconv.weights.checkpoint import checkpoint_filter_fn, read_checkpoint, select_weights


def save_as_the_authors_do(path, ema, model=None):
    """As timm's CheckpointSaver of the authors' time wrote it."""
    torch.save({
        'epoch': 299, 'arch': 'SMPConv_T', 'version': 2, 'metric': 82.5, 'args': argparse.Namespace(lr=4e-3),
        'optimizer': {'state': {0: {'step': 1}}, 'param_groups': []},
        'state_dict': {f'module.{k}': v for k, v in (model or ema).items()}, 'state_dict_ema': ema,
    }, path)
    return str(path)


def load(name, **kwargs):
    """A pretrained model; `overlay` is its pretrained_cfg_overlay."""
    overlay = kwargs.pop('overlay')
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


def load_small(overlay, **kwargs):
    return small_model(pretrained=True, pretrained_cfg_overlay=overlay, shake=False, **kwargs)


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in state.items())


def without(sd, key):
    return {k: v for k, v in sd.items() if k != key}


OURS = {  # authors' key: ours
    'stages.0.blocks.0.large_kernel.smp.conv.weight_coord': 'stages.0.blocks.0.dwconv.large.conv.kernel.coords',
    'stages.0.blocks.0.large_kernel.smp.conv.radius': 'stages.0.blocks.0.dwconv.large.conv.kernel.radius',
    'stages.0.blocks.0.large_kernel.smp.conv.weights': 'stages.0.blocks.0.dwconv.large.conv.kernel.weight',
    'stages.2.blocks.2.large_kernel.smp.conv.weight_coord': 'stages.2.blocks.2.dwconv.large.conv.kernel.coords',
    'stages.2.blocks.2.large_kernel.smp.conv.radius': 'stages.2.blocks.2.dwconv.large.conv.kernel.radius',
    'stages.2.blocks.2.large_kernel.smp.conv.weights': 'stages.2.blocks.2.dwconv.large.conv.kernel.weight',
    'stages.3.blocks.2.large_kernel.small_conv.conv.weight': 'stages.3.blocks.2.dwconv.small.conv.weight',
    'stages.1.blocks.3.pw1.conv.weight': 'stages.1.blocks.3.pw1.conv.weight',
    'transitions.1.0.conv.weight': 'stages.2.downsample.0.conv.weight',
    'head.weight': 'head.fc.weight',
}


@pytest.mark.parametrize('name,h,w', [
    ('smpconv_mobile31', 64, 64),
    *(pytest.param(name, 64, 64, marks=pytest.mark.slow) for name in IMAGENET_MODELS if name != 'smpconv_mobile31'),
    pytest.param('smpconv_tiny', 40, 96, marks=pytest.mark.slow),
])
def test_authors_checkpoint_gives_the_oracles_logits_and_gradients(name, h, w, tmp_path):
    sd = authors_state_dict(name)
    noise = {k: torch.zeros_like(v) for k, v in sd.items()}
    model = load(name, overlay=dict(file=save_as_the_authors_do(tmp_path / 'a.pth', ema=sd, model=noise)))
    x = torch.randn(1, 3, h, w, requires_grad=True)
    exact = {k: v.double().requires_grad_(k in OURS) if v.is_floating_point() else v for k, v in sd.items()}
    x_exact = x.detach().double().requires_grad_()
    expected, actual = logits(exact, name, x_exact), model(x)
    assert difference(actual, expected) < 1e-4
    cotangent = torch.randn(expected.shape, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, [x_exact, *(exact[k] for k in OURS)], cotangent)
    parameters = dict(model.named_parameters())
    got = torch.autograd.grad(actual, [x, *(parameters[k] for k in OURS.values())], cotangent.float())
    for key, g, e in zip(['input', *OURS], got, wanted):
        assert difference(g, e.reshape(g.shape)) < 1e-4, key


def zeros(sd):
    return {k: torch.zeros_like(v) for k, v in sd.items()}


@pytest.mark.parametrize('wrap', [
    lambda sd: sd,
    lambda sd: {f'module.{k}': v for k, v in sd.items()},
    lambda sd: {f'_orig_mod.module.{k}': v for k, v in sd.items()},
    lambda sd: {'state_dict': sd, 'args': argparse.Namespace()},
    lambda sd: {'state_dict': {}, 'state_dict_ema': {f'module.{k}': v for k, v in sd.items()}},
    lambda sd: {'state_dict': sd, 'state_dict_ema': None},
    lambda sd: {'model': sd},
    lambda sd: {'model': sd, 'ema': 0.999},
    lambda sd: {'model': zeros(sd), 'ema': sd},
    lambda sd: {'model': zeros(sd), 'model_ema': sd},
    lambda sd: {'state_dict': zeros(sd), 'state_dict_ema': sd},
])
def test_filter_takes_every_wrapping(wrap, authors, model):
    assert same(checkpoint_filter_fn(wrap(authors), model), model.state_dict())


@pytest.mark.parametrize('wrap,message', [
    (lambda sd: {'state_dict_ema': sd, 'ema': sd}, 'must hold ema weights once, got state_dict_ema and ema'),
    (lambda sd: {'state_dict': sd, 'model': sd}, 'must hold model weights once, got state_dict and model'),
    (lambda sd: {'model': sd, 'ema': {'module': sd, 'updates': 3}}, r'extra \(module, updates\)'),
    (lambda sd: {'module.stem.0.conv.weight': sd['stem.0.conv.weight'], **sd}, 'got stem.0.conv.weight with and with'),
    (lambda sd: {**sd, '_orig_mod.norm.bias': sd['norm.bias']}, 'got norm.bias with and without a prefix'),
    (lambda sd: {**sd, 'head.norm.bias': sd['norm.bias']}, 'every weight once, got head.norm.bias under two names'),
    (lambda sd: dict(enumerate(sd.values())), 'must have names as keys, got 0'),
])
def test_filter_refuses_what_is_ambiguous(wrap, message, authors, model):
    with pytest.raises(CheckpointError, match=message):
        checkpoint_filter_fn(wrap(authors), model)


def test_weights_of_one_kind():
    weight, ema = {'weight': torch.ones(1)}, {'weight': torch.zeros(1)}
    assert select_weights({'model': weight, 'ema': ema}, 'model') == (weight, 'model')
    assert select_weights({'model': weight, 'ema': ema}) == (ema, 'ema')
    assert select_weights(weight) == (weight, 'model')
    with pytest.raises(CheckpointError, match="weights must be 'model' for a checkpoint without state_dict_ema"):
        select_weights({'model': weight}, 'ema')


def test_filter_leaves_our_own_layout_alone(model):
    assert same(checkpoint_filter_fn(model.state_dict(), model), model.state_dict())


@pytest.mark.parametrize('suffix', ['pth', 'pt', 'pth.tar', 'safetensors'])
def test_file_formats(suffix, tmp_path, model, images):
    path = str(tmp_path / f'weights.{suffix}')
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, path) if suffix == 'safetensors' else torch.save(state, path)
    twin = load_small(dict(file=path))
    assert torch.equal(twin(images), model(images))
    assert 'state_dict' not in twin.pretrained_cfg


class Payload:
    """A pickle that would create a file when it is loaded as code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


def truncated(path, part=0.5):
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * part)])


@pytest.mark.parametrize('kind', [
    'missing', 'truncated.pth', 'truncated legacy.pth', 'truncated.safetensors', 'text.pth', 'text.safetensors',
    'empty.pth', 'code.pth', 'list.pth', 'tensor.pth', 'folder.pth'])
def test_a_file_that_is_no_checkpoint_is_named_and_not_run(kind, tmp_path, model):
    path, witness = tmp_path / kind.replace(' ', '_'), tmp_path / 'witness'
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    if kind == 'truncated.safetensors':
        save_file(state, path)
        truncated(path)
    elif kind.startswith('truncated'):
        torch.save(state, path, _use_new_zipfile_serialization='legacy' not in kind)
        truncated(path)
    elif kind.startswith('text'):
        path.write_text('<html>Quota exceeded</html>', encoding='utf-8')
    elif kind == 'empty.pth':
        path.touch()
    elif kind == 'code.pth':
        torch.save({'state_dict': state, 'args': Payload(witness)}, path)
    elif kind == 'list.pth':
        torch.save([1, 2], path)
    elif kind == 'tensor.pth':
        torch.save(torch.zeros(3), path)
    elif kind == 'folder.pth':
        path.mkdir()
    with pytest.raises(CheckpointError, match='file must ') as caught:
        load_small(dict(file=str(path)))
    assert str(path) in str(caught.value)
    assert not witness.exists()


CONTENT = {'state_dict': {'a': torch.arange(2.), 'b.c': torch.arange(3.)}}


@pytest.mark.parametrize('legacy', [False, True])
def test_a_file_that_is_cut_anywhere_is_named(legacy, tmp_path):
    path = tmp_path / 'cut.pth'
    torch.save(CONTENT, path, _use_new_zipfile_serialization=not legacy)
    data = path.read_bytes()
    for length in range(0, len(data) - 1, max(1, len(data) // 150)):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match='file must be an undamaged weights-only checkpoint') as caught:
            read_checkpoint(str(path))
        assert str(path) in str(caught.value)


def test_a_file_of_the_old_format_is_read(tmp_path):
    torch.save(CONTENT, tmp_path / 'a.pth', _use_new_zipfile_serialization=False)
    assert same(read_checkpoint(tmp_path / 'a.pth')['state_dict'], CONTENT['state_dict'])


RADIUS = 'stages.1.blocks.0.large_kernel.smp.conv.radius'
COORDS = 'stages.1.blocks.0.large_kernel.smp.conv.weight_coord'


@pytest.mark.parametrize('change,message', [
    (lambda sd: without(sd, RADIUS), r'1 missing \(stages.1.blocks.0.dwconv.large.conv.kernel.radius\)'),
    (lambda sd: dict(sd, surplus=torch.zeros(1)), r'1 extra \(surplus\)'),
    (lambda sd: dict(without(sd, 'stem.0.bn.bias'), extra=torch.zeros(1)), r'1 missing \(stem.0.bn.bias\) and 1 extra'),
    (lambda sd: dict(sd, **{'norm.weight': torch.zeros(3)}), r'head.norm.weight \(3,\) instead of \(32,\)'),
    (lambda sd: dict(sd, **{RADIUS: sd[RADIUS] / 0}), 'kernel.radius must be finite everywhere, got'),
    (lambda sd: dict(sd, **{COORDS: sd[COORDS] * float('nan')}), 'kernel.coords must be finite everywhere, got'),
    (lambda sd: dict(sd, **{COORDS: sd[COORDS].double() + 1e300}), 'kernel.coords must be finite everywhere, got'),
    (lambda sd: dict(sd, **{RADIUS: sd[RADIUS].flatten()}), r'kernel.radius \(12,\) instead of \(1, 12\)'),
    (lambda sd: dict(sd, **{RADIUS: sd[RADIUS].char()}), 'radius must have a floating point dtype, got torch.int8'),
    (lambda sd: dict(sd, **{'stem.1.bn.bias': 3}), 'stem.1.bn.bias must be a tensor, got int'),
    (lambda sd: dict(sd, **{'head.weight': sd['head.weight'].char()}), 'head.fc.weight must have a float.* torch.int8'),
    (lambda sd: dict(sd, **{'head.weight': sd['head.weight'].to_sparse()}), 'must be a dense tensor, got torch.spars'),
    (lambda sd: {}, 'missing'),
    (lambda sd: {'state_dict': {}}, 'missing'),
])
def test_a_checkpoint_that_does_not_fit_says_where(change, message, authors, tmp_path):
    path = tmp_path / 'a.pth'
    torch.save(change(authors), path)
    for num_classes in 10, 5:
        with pytest.raises(CheckpointError, match=message):
            load_small(dict(file=str(path)), num_classes=num_classes)
