"""Authors' checkpoints against the oracle network, and every way in which a checkpoint can be bad."""
import argparse
import os

import pytest
import timm
import torch
from conftest import MODELS, difference, small_model
from reference import authors_state_dict, logits
from safetensors.torch import save_file
from timm.utils import reparameterize_model

from timm_smpconv import CheckpointError
from timm_smpconv.checkpoint import checkpoint_filter_fn, read_checkpoint


def save_as_the_authors_do(path, ema, model=None):
    """As timm's CheckpointSaver of the authors' time wrote it."""
    torch.save({
        'epoch': 299, 'arch': 'SMPConv_T', 'version': 2, 'metric': 82.5, 'args': argparse.Namespace(lr=4e-3),
        'optimizer': {'state': {0: {'step': 1}}, 'param_groups': []},
        'state_dict': {f'module.{k}': v for k, v in (model or ema).items()}, 'state_dict_ema': ema,
    }, path)
    return str(path)


def load(name, file, **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=file), **kwargs).eval()


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


@pytest.mark.parametrize('name,h,w', [(name, 64, 64) for name in MODELS] + [('smpconv_tiny', 40, 96)])
def test_authors_checkpoint_gives_the_oracles_logits_and_gradients(name, h, w, tmp_path):
    sd = authors_state_dict(name)
    noise = {k: torch.zeros_like(v) for k, v in sd.items()}
    model = load(name, save_as_the_authors_do(tmp_path / 'a.pth', ema=sd, model=noise))
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


@pytest.fixture(scope='module')
def mobile():
    return authors_state_dict('smpconv_mobile31')


@pytest.mark.parametrize('wrap', [
    lambda sd: sd,
    lambda sd: {f'module.{k}': v for k, v in sd.items()},
    lambda sd: {'state_dict': sd, 'args': argparse.Namespace()},
    lambda sd: {'state_dict': {}, 'state_dict_ema': {f'module.{k}': v for k, v in sd.items()}},
    lambda sd: {'state_dict': sd, 'state_dict_ema': None},
    lambda sd: {'model': sd},
])
def test_filter_takes_every_wrapping(wrap, mobile):
    model = timm.create_model('smpconv_mobile31', device='meta')
    out = checkpoint_filter_fn(wrap(mobile), model)
    assert {k: v.shape for k, v in out.items()} == {k: v.shape for k, v in model.state_dict().items()}
    for theirs, ours in OURS.items():
        assert torch.equal(out[ours].flatten(), mobile[theirs].flatten())


def test_filter_leaves_our_own_layout_alone(model):
    state = model.state_dict()
    out = checkpoint_filter_fn(state, model)
    assert out.keys() == state.keys() and all(torch.equal(out[k], v) for k, v in state.items())


@pytest.mark.parametrize('suffix', ['pth', 'pt', 'pth.tar', 'safetensors'])
def test_file_formats(suffix, tmp_path, model, images):
    path = str(tmp_path / f'weights.{suffix}')
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, path) if suffix == 'safetensors' else torch.save(state, path)
    twin = small_model(pretrained=True, pretrained_cfg_overlay=dict(file=path, num_classes=10), shake=False)
    assert torch.equal(twin(images), model(images))
    assert 'state_dict' not in twin.pretrained_cfg


def test_other_classes_and_channels(mobile, tmp_path):
    file = save_as_the_authors_do(tmp_path / 'a.pth', mobile)
    full = load('smpconv_mobile31', file)
    features = full.forward_features(torch.ones(1, 3, 32, 32))
    for kwargs in (dict(num_classes=7), dict(num_classes=0), dict(features_only=True)):
        other = load('smpconv_mobile31', file, **kwargs)
        out = other(torch.ones(1, 3, 32, 32))
        if kwargs.get('features_only'):
            assert torch.equal(out[-1], features)
        else:
            assert torch.equal(other.forward_features(torch.ones(1, 3, 32, 32)), features)
    gray = load('smpconv_mobile31', file, in_chans=1)  # timm sums the first convolution over its input channels
    assert difference(gray.forward_features(torch.ones(1, 1, 32, 32)), features) < 1e-5


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
        path.write_text('<html>Quota exceeded</html>')
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
        small_model(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    assert str(path) in str(caught.value)
    assert not witness.exists()


@pytest.mark.parametrize('legacy', [False, True])
def test_a_file_cut_or_damaged_anywhere_is_named(legacy, tmp_path):
    path = tmp_path / 'cut.pth'
    torch.save(
        {'state_dict': {'a': torch.zeros(2), 'b.c': torch.ones(3)}}, path, _use_new_zipfile_serialization=not legacy)
    data = path.read_bytes()
    step = max(1, len(data) // 150)
    for length in range(0, len(data) - 1, step):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match='file must hold weights alone'):
            read_checkpoint(str(path))
    for position in range(0, min(len(data), 1500), 7):
        path.write_bytes(data[:position] + b'\xff\x80\x2e' + data[position + 3:])
        try:
            read_checkpoint(str(path))
        except CheckpointError as error:
            assert str(path) in str(error)


def without(sd, key):
    return {k: v for k, v in sd.items() if k != key}


RADIUS = 'stages.1.blocks.0.large_kernel.smp.conv.radius'


@pytest.mark.parametrize('change,message', [
    (lambda sd: without(sd, RADIUS), r'1 missing \(stages.1.blocks.0.dwconv.large.conv.kernel.radius\)'),
    (lambda sd: dict(sd, surplus=torch.zeros(1)), r'1 extra \(surplus\)'),
    (lambda sd: dict(without(sd, 'stem.0.bn.bias'), extra=torch.zeros(1)), r'1 missing \(stem.0.bn.bias\) and 1 extra'),
    (lambda sd: dict(sd, **{'norm.weight': torch.zeros(3)}), r'head.norm.weight \(3,\) instead of \(320,\)'),
    (
        lambda sd: dict(sd, **{RADIUS: torch.zeros_like(sd[RADIUS])}),
        'radius must be positive and finite everywhere.* 0.0'),
    (lambda sd: dict(sd, **{RADIUS: sd[RADIUS] / 0}), 'radius must be positive and finite everywhere, got inf'),
    (lambda sd: dict(sd, **{RADIUS: sd[RADIUS].flatten()}), r'kernel.radius \(105,\) instead of \(1, 105\)'),
    (lambda sd: dict(sd, **{'stem.1.bn.bias': 3}), "state_dict must hold tensors alone, got 'stem.1.bn.bias': int"),
    (lambda sd: {}, 'missing'),
    (lambda sd: {'state_dict': {}}, 'missing'),
])
@pytest.mark.parametrize('num_classes', [1000, 5])
def test_a_checkpoint_that_does_not_fit_says_where(change, message, num_classes, mobile, tmp_path):
    path = tmp_path / 'a.pth'
    torch.save(change(mobile), path)
    with pytest.raises(CheckpointError, match=message):
        load('smpconv_mobile31', str(path), num_classes=num_classes)


@pytest.mark.parametrize('strict', [True, False])
def test_nothing_is_loaded_from_a_state_dict_that_does_not_fit(strict, model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v + 1 for k, v in before.items()}
    state['head.fc.weight'] = torch.zeros(3, 3)
    with pytest.raises(CheckpointError, match=r'head.fc.weight \(3, 3\) instead of \(10, 32\)'):
        model.load_state_dict(state, strict=strict)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize('strict', [True, False])
def test_a_radius_that_is_not_positive_is_never_loaded(strict, model):
    key = 'stages.0.blocks.0.dwconv.large.conv.kernel.radius'
    before = model.state_dict()[key].clone()
    for value in (-1., 0., float('nan')):
        state = dict(model.state_dict(), **{key: torch.full_like(before, value)})
        with pytest.raises(CheckpointError, match='radius must be positive and finite everywhere, got'):
            model.load_state_dict(state, strict=strict)
    assert torch.equal(model.state_dict()[key], before)


def test_strict_false_loads_what_is_there(model):
    result = model.load_state_dict({'head.fc.bias': torch.ones(10), 'other': torch.ones(1)}, strict=False)
    assert result.unexpected_keys == ['other'] and 'stem.0.conv.weight' in result.missing_keys
    assert model.head.fc.bias.tolist() == [1.] * 10


def test_the_authors_layout_without_the_filter_says_what_to_do(mobile):
    with pytest.raises(CheckpointError, match='layout of the authors: load it through checkpoint_filter_fn'):
        timm.create_model('smpconv_mobile31').load_state_dict(mobile)


def test_merged_and_unmerged_checkpoints_are_not_mixed_up(tmp_path, model, images):
    merged = reparameterize_model(model)
    unmerged_file, merged_file = tmp_path / 'unmerged.pth', tmp_path / 'merged.pth'
    torch.save(model.state_dict(), unmerged_file)
    torch.save(merged.state_dict(), merged_file)
    into_unmerged = 'state_dict is of a merged model and this model is not merged: create .* with inference_mode=True'
    into_merged = 'state_dict is of an unmerged model and this model is merged: load it into a model created without'
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=into_unmerged):
            model.load_state_dict(merged.state_dict(), strict=strict)
        with pytest.raises(CheckpointError, match=into_merged):
            merged.load_state_dict(model.state_dict(), strict=strict)
    within = torch.nn.Sequential(model)  # as a part of something larger
    state = {f'0.{k}': v for k, v in merged.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=into_unmerged):
            within.load_state_dict(state, strict=strict)
    for num_classes in (10, 4):
        with pytest.raises(CheckpointError, match=into_unmerged):
            small_model(
                pretrained=True, pretrained_cfg_overlay=dict(file=str(merged_file), num_classes=10),
                num_classes=num_classes)
        with pytest.raises(CheckpointError, match=into_merged):
            small_model(
                pretrained=True, pretrained_cfg_overlay=dict(file=str(unmerged_file), num_classes=10),
                num_classes=num_classes, inference_mode=True)
