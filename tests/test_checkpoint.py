"""Checkpoints of the authors against the oracle network, every way to load one, and every way in which one is bad."""
import argparse
import copy
import logging
import os

import pytest
import timm
import torch
from conftest import MODELS, difference, small_model
from hub_server import Repository
from reference import authors_state_dict, in_authors_layout, logits
from safetensors.torch import save_file
from timm.models import load_checkpoint, save_for_hf
from timm.utils import reparameterize_model
from torch.serialization import set_crc32_options

from timm_smpconv import CheckpointError
from timm_smpconv.checkpoint import checkpoint_filter_fn, read_checkpoint, select_weights


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
    *(pytest.param(name, 64, 64, marks=pytest.mark.slow) for name in MODELS if name != 'smpconv_mobile31'),
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


@pytest.fixture
def authors(model):
    """The weights of the small model as the authors' code would save them."""
    sd = in_authors_layout(model.state_dict())
    for key, value in list(sd.items()):
        if key.endswith('.radius'):
            sd[key] = value.reshape(1, -1, 1, 1)
            sd[key.replace('radius', 'kernel_coord')] = torch.zeros(1, 2, 3, 3)
    return sd


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


@pytest.fixture
def file(tmp_path, model):
    """The small model's weights and its classifier of 10 classes."""
    torch.save(model.state_dict(), tmp_path / 'ours.pth')
    return str(tmp_path / 'ours.pth')


@pytest.fixture
def said(caplog):
    """The warnings about classifiers that were logged so far."""
    caplog.set_level(logging.WARNING, 'timm_smpconv')
    return lambda: [r.getMessage() for r in caplog.records if 'keeps its initial weights' in r.getMessage()]


def test_the_classifier_of_a_file_is_loaded_if_the_model_has_as_many_classes(tmp_path, file, model, authors, said):
    theirs = save_as_the_authors_do(tmp_path / 'theirs.pth', authors)
    for overlay in dict(file=file), dict(file=theirs), dict(state_dict=model.state_dict()):
        for classes in 10, None:
            assert same(load_small(overlay, num_classes=classes).state_dict(), model.state_dict())
    merged = reparameterize_model(model)
    torch.save(merged.state_dict(), tmp_path / 'merged.pth')
    assert same(
        load_small(dict(file=str(tmp_path / 'merged.pth')), inference_mode=True).state_dict(), merged.state_dict())
    assert not said()


def test_other_channels(file, model, said):
    gray = load_small(dict(file=file), in_chans=1)  # timm sums the first convolution over its input channels
    x = torch.ones(1, 3, 32, 32)
    assert difference(gray(x[:, :1]), model(x)) < 1e-5 and not said()


@pytest.mark.parametrize('kwargs,overlay,message', [
    (
        dict(num_classes=5), {},
        '(num_classes=5) is not loaded and keeps its initial weights: FILE has 10 classes, and pretrained_cfg has '
        'num_classes=10'),
    (dict(num_classes=10), dict(num_classes=-1), 'FILE has 10 classes, and pretrained_cfg has num_classes=-1'),
    (dict(num_classes=None), dict(num_classes=-1), '(num_classes=default) is not loaded'),  # what train.py passes
    (dict(num_classes=0), {}, None),
    (dict(features_only=True), {}, None),
])
def test_a_classifier_that_is_not_loaded_is_logged(kwargs, overlay, message, file, model, images, said):
    twin = load_small(dict(file=file, **overlay), **kwargs)
    features = twin(images)[-1] if 'features_only' in kwargs else twin.forward_features(images)
    assert torch.equal(features, model.forward_features(images))
    if message:
        (warning,) = said()
        assert message.replace('FILE', file) in warning
    else:
        assert not said()


def test_a_file_without_classifier(file, model, said):
    torch.save({k: v for k, v in model.state_dict().items() if 'head.fc' not in k}, file)
    assert load_small(dict(file=file)).num_classes == 10
    assert f'{file} has 0 classes, and pretrained_cfg has num_classes=1000' in said()[0]
    with pytest.raises(CheckpointError, match=r'2 missing \(head.fc.weight, head.fc.bias\)'):
        load_small(dict(file=file), num_classes=1000)


REPO = 'alice/small'
SMALL = dict(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), kernel_sizes=(9, 7, 7, 5))


@pytest.fixture
def folder(tmp_path):
    """A folder of timm's with the weights of another small model, of 10 classes too."""
    other = small_model()
    torch.nn.init.normal_(other.head.fc.weight)
    save_for_hf(other, tmp_path / 'folder', model_args=SMALL, safe_serialization='both')
    return tmp_path / 'folder'


@pytest.fixture
def hub(server, folder):
    """That folder on a Hub."""
    server.repositories[REPO] = repository = Repository(private=False)
    repository.commit('main', 'small', {
        path.name: repository.store(path.read_bytes(), large=path.suffix != '.json') for path in folder.iterdir()})


@pytest.mark.parametrize('source,overlay', [
    ('smpconv_tiny', 'file'), ('smpconv_tiny', 'url'), ('hub', 'file'), ('hub', 'url'), ('hub', 'state_dict'),
    ('folder', 'file'), ('folder', 'url'),
])
def test_what_an_overlay_names_is_loaded(source, overlay, file, folder, hub, tmp_path, model, images):
    name = {'hub': f'hf-hub:{REPO}', 'folder': f'local-dir:{folder}'}.get(source, source)
    value = {'file': file, 'url': f'file://{file}', 'state_dict': model.state_dict()}[overlay]
    twin = load(name, overlay={overlay: value, 'num_classes': 10}, cache_dir=tmp_path / 'cache', **SMALL)
    assert torch.equal(twin(images), model(images))


@pytest.mark.parametrize('source', ['hub', 'folder', 'overlay'])
def test_what_a_folder_or_a_repository_holds_is_loaded(source, folder, hub, tmp_path, images, said):
    name = {'hub': f'hf-hub:{REPO}', 'folder': f'local-dir:{folder}', 'overlay': 'smpconv_tiny'}[source]
    overlay = dict(hf_hub_id=REPO) if source == 'overlay' else None
    expected = small_model(shake=False)
    expected.load_state_dict(torch.load(folder / 'pytorch_model.bin'))
    for classes in 10, None:
        twin = load(name, overlay=overlay, num_classes=classes, cache_dir=tmp_path / 'cache', **SMALL)
        assert torch.equal(twin(images), expected(images)) and not said()
    load(name, overlay=overlay, num_classes=5, cache_dir=tmp_path / 'cache', **SMALL)
    assert len(said()) == (source == 'overlay')  # the other two are described by their own config.json


def test_a_url_whose_classes_are_unknown(file, tmp_path, said):
    load('smpconv_tiny', overlay=dict(url=f'file://{file}'), cache_dir=tmp_path / 'cache', num_classes=10, **SMALL)
    assert 'has unknown classes, and pretrained_cfg has num_classes=1000' in said()[0]


def test_timms_own_functions(file, model):
    assert same(small_model(checkpoint_path=file, shake=False).state_dict(), model.state_dict())
    twin = small_model(shake=False)
    load_checkpoint(twin, file)
    assert same(twin.state_dict(), model.state_dict())


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


def content_is(checkpoint):
    return same(checkpoint['state_dict'], CONTENT['state_dict'])


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


@pytest.mark.parametrize('damage,step', [(b'\x10', 2), (b'\xff\xff\xff', 3)])
def test_a_file_that_is_damaged_anywhere_is_refused_or_read_correctly(damage, step, tmp_path):
    path = tmp_path / 'damaged.pth'
    torch.save(CONTENT, path)
    data = path.read_bytes()
    messages = []
    for position in range(0, len(data), step):
        spoilt = bytearray(data)
        for i, bits in enumerate(damage[:len(data) - position]):
            spoilt[position + i] ^= bits
        path.write_bytes(spoilt)
        try:
            assert content_is(read_checkpoint(str(path))), position
        except CheckpointError as error:
            messages.append(str(error))
    assert len(messages) > len(data) / step / 4  # the rest is padding, or is not read
    assert all(str(path) in message for message in messages)


def flipped(path, value):
    """One bit of a stored float changes, as in storage."""
    data = path.read_bytes()
    position = data.index(torch.tensor(value).numpy().tobytes())
    path.write_bytes(data[:position + 3] + bytes([data[position + 3] ^ 0x40]) + data[position + 4:])


def test_a_flipped_bit_in_a_checkpoint_or_a_folder_is_found(file, folder, model, tmp_path):
    value = model.head.fc.weight[3, 3].item()
    (folder / 'model.safetensors').unlink()  # timm reads pytorch_model.bin if this is absent
    torch.save(model.state_dict(), folder / 'pytorch_model.bin')
    for path, make in (
            (tmp_path / 'ours.pth', lambda: load_small(dict(file=file))),
            (folder / 'pytorch_model.bin', lambda: load(f'local-dir:{folder}', overlay=None))):
        assert make().head.fc.weight[3, 3].item() == value
        flipped(path, value)
        with pytest.raises(CheckpointError, match=f"{path.name}'.*Bad CRC-32"):
            make()


def test_a_file_without_checksums_is_read(tmp_path):
    path = tmp_path / 'a.pth'
    torch.save(CONTENT, path, _use_new_zipfile_serialization=False)
    assert content_is(read_checkpoint(path))
    set_crc32_options(False)
    try:
        torch.save(CONTENT, path)
    finally:
        set_crc32_options(True)
    assert content_is(read_checkpoint(path))


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
@pytest.mark.filterwarnings('ignore:Validating sparse tensor invariants')
def test_a_checkpoint_that_does_not_fit_says_where(change, message, authors, tmp_path):
    path = tmp_path / 'a.pth'
    torch.save(change(authors), path)
    for num_classes in 10, 5:
        with pytest.raises(CheckpointError, match=message):
            load_small(dict(file=str(path)), num_classes=num_classes)


BAD_VALUES = {
    'shape': (lambda v: torch.zeros(3, 3), r'\(3, 3\) instead of'),
    'int8': (torch.Tensor.char, 'must have a floating point dtype, got torch.int8'),
    'bool': (torch.Tensor.bool, 'must have a floating point dtype, got torch.bool'),
    'complex': (lambda v: v.cfloat(), 'must have a floating point dtype, got torch.complex64'),
    'quantised': (
        lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8),
        'must have a floating point dtype, got torch.qint8'),
    'sparse': (torch.Tensor.to_sparse, 'must be a dense tensor, got torch.sparse_coo'),
    'nested': (lambda v: torch.nested.as_nested_tensor([v.flatten(), v.flatten()[:2]]), 'a dense tensor, got nested'),
    'meta': (lambda v: v.to('meta'), 'must hold values, got a tensor on the meta device'),
    'list': (torch.Tensor.tolist, 'must be a tensor, got list'),
}


def spoilt(state, end, change):
    """The state with its last entry of that name changed, and all others unlike those of any model."""
    key = [k for k in state if k.endswith(end)][-1]
    state = {k: v + 1 for k, v in state.items()}
    return dict(state, **{key: change(state[key])}), key


HOLDERS = {
    'net': small_model,
    'features_only': lambda: small_model(features_only=True),
    'copy of features_only': lambda: copy.deepcopy(small_model(features_only=True)),
    'data parallel': lambda: torch.nn.DataParallel(small_model()),
    'within': lambda: torch.nn.Sequential(small_model(), torch.nn.Linear(10, 2)),
}


@pytest.fixture(scope='module', params=HOLDERS)
def holder(request):
    """A model, or what holds one."""
    return HOLDERS[request.param]()


@pytest.mark.filterwarnings('ignore:The PyTorch API of nested tensors', 'ignore:torch.quantize_per_tensor')
@pytest.mark.parametrize('kind', BAD_VALUES)
def test_nothing_is_loaded_from_a_state_dict_with_a_bad_value(kind, holder):
    change, message = BAD_VALUES[kind]
    before = copy.deepcopy(holder.state_dict())
    for end in 'kernel.weight', 'kernel.radius', 'bn.running_var':
        state, key = spoilt(before, end, change)
        for strict in True, False:
            with pytest.raises(CheckpointError, match=message) as caught:
                holder.load_state_dict(state, strict=strict)
            assert key.removeprefix('module.').removeprefix('0.') in str(caught.value)
            assert same(holder.state_dict(), before)


@pytest.mark.parametrize('strict', [True, False])
def test_points_that_are_not_finite_are_never_loaded(strict, holder):
    before = copy.deepcopy(holder.state_dict())
    for end in 'kernel.radius', 'kernel.coords':
        for number in float('nan'), float('inf'), -float('inf'):
            state, _ = spoilt(before, end, lambda v, number=number: torch.where(v == v.flatten()[-1], number, v))
            with pytest.raises(CheckpointError, match='must be finite everywhere, got'):
                holder.load_state_dict(state, strict=strict)
            assert same(holder.state_dict(), before)


@pytest.mark.parametrize('strict', [True, False])
def test_points_out_of_range_are_loaded(strict, holder):
    for end in 'kernel.radius', 'kernel.coords':
        for number in 0., -1., 5.:
            state, _ = spoilt(holder.state_dict(), end, lambda v, number=number: torch.full_like(v, number))
            holder.load_state_dict(state, strict=strict)
            assert same(holder.state_dict(), state)


@pytest.mark.parametrize('change', [
    lambda sd, key: without(sd, key), lambda sd, key: dict(sd, extra=sd[key]),
    lambda sd, key: dict(without(sd, key), **{key.upper(): sd[key]})])
def test_nothing_is_loaded_strictly_if_a_key_is_missing_or_unexpected(change, model):
    for holder in model, small_model(features_only=True):
        before = copy.deepcopy(holder.state_dict())
        state, key = spoilt(before, 'kernel.weight', torch.clone)
        with pytest.raises(CheckpointError, match=f'exactly the keys of the model, got .*({key}|extra)'):
            holder.load_state_dict(change(state, key))
        assert same(holder.state_dict(), before)


def test_real_dtypes_that_differ_are_converted(model):
    expected = model.state_dict()
    for dtype in torch.float64, torch.float32:
        # A counter averaged by timm's avg_checkpoints.py is a float.
        model.load_state_dict({k: v.to(dtype) for k, v in expected.items()})
        assert same(model.state_dict(), expected)
    model.load_state_dict({k: v.int() if 'num_batches' in k else v.bfloat16() for k, v in expected.items()})
    assert same(model.state_dict(), {k: v.bfloat16().to(v.dtype) for k, v in expected.items()})
    for wrong in torch.bool, torch.complex64:
        state, key = spoilt(expected, 'num_batches_tracked', lambda v, wrong=wrong: v.to(wrong))
        with pytest.raises(CheckpointError, match=f'{key} must have an integer or floating point dtype, got {wrong}'):
            model.load_state_dict(state)


def test_a_model_without_values_takes_a_state_dict(model):
    empty = small_model(device='meta', shake=False)
    empty.load_state_dict(empty.state_dict())
    empty.load_state_dict(model.state_dict(), assign=True)
    assert same(empty.state_dict(), model.state_dict())


def test_strict_false_loads_what_is_there(model):
    result = model.load_state_dict({'head.fc.bias': torch.ones(10), 'other': torch.ones(1)}, strict=False)
    assert result.unexpected_keys == ['other'] and 'stem.0.conv.weight' in result.missing_keys
    assert model.head.fc.bias.tolist() == [1.] * 10


def test_the_authors_layout_without_the_filter_says_what_to_do(authors, model):
    with pytest.raises(CheckpointError, match='layout of the authors: load it through checkpoint_filter_fn'):
        model.load_state_dict(authors)


def test_merged_and_unmerged_checkpoints_are_not_mixed_up(tmp_path, model):
    merged = reparameterize_model(model)
    unmerged_file, merged_file = tmp_path / 'unmerged.pth', tmp_path / 'merged.pth'
    torch.save(model.state_dict(), unmerged_file)
    torch.save(merged.state_dict(), merged_file)
    into_unmerged = 'state_dict is merged but the model is not: create the model with inference_mode=True'
    into_merged = 'state_dict is not merged but the model is: load it into a model created without inference_mode'
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=into_unmerged):
            model.load_state_dict(merged.state_dict(), strict=strict)
        with pytest.raises(CheckpointError, match=into_merged):
            merged.load_state_dict(model.state_dict(), strict=strict)
    for within in torch.nn.Sequential(model), torch.nn.Sequential(*model.stages):  # parts of something larger
        state = torch.nn.Sequential(merged if len(within) == 1 else torch.nn.Sequential(*merged.stages)).state_dict()
        state = state if len(within) == 1 else {k.removeprefix('0.'): v for k, v in state.items()}
        before = copy.deepcopy(within.state_dict())
        for strict in (True, False):
            with pytest.raises(CheckpointError, match=into_unmerged):
                within.load_state_dict(state, strict=strict)
            assert len(within) > 1 or same(within.state_dict(), before)
    for num_classes in (10, 4):
        with pytest.raises(CheckpointError, match=into_unmerged):
            load_small(dict(file=str(merged_file)), num_classes=num_classes)
        with pytest.raises(CheckpointError, match=into_merged):
            load_small(dict(file=str(unmerged_file)), num_classes=num_classes, inference_mode=True)
