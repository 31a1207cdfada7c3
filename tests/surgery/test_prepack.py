"""`prepack(model, images)`: every way to compute a convolution gives what float64 gives, and the fastest one is taken.

Ways are timed by a clock that says of each what the test wants.
"""
import copy
import io
import logging
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import TOLERANCE, difference
from timm.utils import reparameterize_model

from timm_smpconv import prepack
from timm_smpconv.layers.merged import MergedConv1d, MergedConv2d, MergedLargeConv2d
from timm_smpconv.ops import dense, fused, use_backend
from timm_smpconv.ops.dispatch import cpu, timing

ACTIVATIONS = {'none': lambda y: y, 'relu': torch.relu, 'gelu': F.gelu}


class Clock:
    """A clock, and what made it go on."""

    def __init__(self):
        self.now = 0.
        self.seconds = {}
        self.seen = []

    def __call__(self):
        return self.now

    def spend(self, way):
        self.seen.append(way)
        self.now += self.seconds.get(way, 1.)


@pytest.fixture
def clock(monkeypatch):
    """Each way to compute a convolution takes one second, or what `clock.seconds` says."""
    clock = Clock()
    compute = fused._compute

    def timed(way, *args):
        clock.spend(way)
        return compute(way, *args)

    monkeypatch.setattr(fused, '_compute', timed)
    monkeypatch.setattr(timing, '_clock', clock)
    monkeypatch.setattr(cpu, 'HERE', cpu.CPU('AVX512', cpu.HERE.onednn))
    return clock


def convolution(kind, activation='none'):
    """A merged convolution and its images."""
    size = {'pointwise': (40, 24, 9, 7), 'depthwise': (32, 32, 20, 17), 'strided': (16, 16, 9, 8)}[kind]
    chs, out_chs, h, w = size
    rest = {
        'pointwise': dict(kernel_size=1), 'depthwise': dict(kernel_size=(15, 31), padding=(7, 15), groups=32),
        'strided': dict(kernel_size=3, stride=2, padding=1, groups=16)}[kind]
    conv = MergedConv2d(chs, out_chs, activation=activation, **rest).eval()
    torch.nn.init.normal_(conv.weight, std=conv.weight[0].numel() ** -0.5)
    torch.nn.init.normal_(conv.bias)
    return conv, torch.randn(3, chs, h, w)


def exact(conv, x, residual=None):
    y = F.conv2d(
        x.double(), conv.weight.double(), conv.bias.double(), conv.stride, conv.padding, groups=conv.groups)
    y = ACTIVATIONS[conv.activation](y)
    return y if residual is None else y + residual.double()


WAYS = [
    ('pointwise', torch.channels_last, ('matrix product', 'one pass', 'native')),
    ('depthwise', torch.channels_last, ('one pass', 'native', 'contiguous', 'fft')),
    ('depthwise', torch.contiguous_format, ('native', 'channels_last', 'fft')),
    ('strided', torch.channels_last, ('one pass', 'native')),
    ('pointwise', torch.contiguous_format, ('native',)),
]


@torch.no_grad()
@pytest.mark.parametrize('activation', ACTIVATIONS)
@pytest.mark.parametrize('kind,memory_format,ways', WAYS)
def test_the_fastest_way_is_taken_and_right(kind, memory_format, ways, activation, clock):
    for fastest in ways:
        conv, x = convolution(kind, activation)
        x = x.contiguous(memory_format=memory_format)
        clock.seconds = {fastest: 0.5}
        clock.seen.clear()
        assert prepack(conv, x) is conv
        assert set(ways) <= set(clock.seen)  # all were tried
        clock.seen.clear()
        for _ in range(2):
            assert difference(conv(x), exact(conv, x)) < 2 * TOLERANCE[torch.float32]
        assert set(clock.seen) == {fastest}
        residual = torch.randn(conv(x).shape).contiguous(memory_format=memory_format)
        assert difference(conv(x, residual), exact(conv, x, residual)) < 2 * TOLERANCE[torch.float32]


@torch.no_grad()
def test_measured_for_such_inputs_alone(clock):
    conv, x = convolution('depthwise')
    clock.seconds = {'contiguous': 0.5}
    x = x.contiguous(memory_format=torch.channels_last)
    prepack(conv, x)
    others = [x[:2], x.double(), x.contiguous(), x[..., :10].contiguous(memory_format=torch.channels_last)]
    for other in others:
        clock.seen.clear()
        conv.to(other.dtype)
        assert difference(conv(other), exact(conv, other)) < TOLERANCE[torch.float32]
        assert 'contiguous' not in clock.seen
        conv.float()
    prepack(conv, others[0].contiguous(memory_format=torch.channels_last))  # adds to what is known
    for known in (x, others[0]):
        clock.seen.clear()
        conv(known.contiguous(memory_format=torch.channels_last))
        assert set(clock.seen) == {'contiguous'}
    prepack(conv)  # forgets
    clock.seen.clear()
    conv(x)
    assert set(clock.seen) != {'contiguous'}


@torch.no_grad()
@pytest.mark.parametrize('fastest', ['matrix product', 'one pass'])
@pytest.mark.parametrize('shape', [(1, 24, 9, 7), (1, 24, 1, 1), (9, 7), (2, 3, 24, 9, 7)])
def test_measured_without_such_a_residual(shape, fastest, clock):
    """A residual that is broadcast, or broadcasts, does not go with every way."""
    conv, x = convolution('pointwise')
    x = x.contiguous(memory_format=torch.channels_last)
    clock.seconds = {fastest: 0.5}
    prepack(conv, x)
    residual = torch.randn(shape)
    assert difference(conv(x, residual), exact(conv, x, residual)) < TOLERANCE[torch.float32]


@torch.no_grad()
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_narrow_bfloat16_is_not_convolved_by_onednn(memory_format, monkeypatch):
    """Such convolutions never return: see `geometry.working_dtype`."""
    conv2d = F.conv2d

    def checked(x, *args, **kwargs):
        assert x.dtype != torch.bfloat16
        return conv2d(x, *args, **kwargs)

    x = torch.randn(1, 8, 32, 32).contiguous(memory_format=memory_format)
    conv = MergedConv2d(8, 8, 15, padding=7, groups=8).eval().bfloat16()
    monkeypatch.setattr(F, 'conv2d', checked)
    prepack(conv, x.bfloat16())
    assert [way for way, _ in conv.kept._fastest.values()] == ['fft']


def test_nothing_is_measured_where_a_backend_is_requested():
    conv = MergedLargeConv2d(3, 5, (9, 17)).eval()
    with use_backend('native'):
        prepack(conv, torch.randn(2, 3, 8, 11))
    assert not conv.kept._fastest


@torch.no_grad()
@pytest.mark.parametrize('fails,reason', [(True, 'no memory'), (False, 'it differs from F.conv2d')])
def test_a_way_that_is_wrong_or_fails_is_left_out(fails, reason, clock, monkeypatch, caplog):
    conv, x = convolution('depthwise')
    right = fused.fft.conv

    def bad(*args):
        if fails:
            raise torch.OutOfMemoryError('no memory')
        return right(*args) * 1.01

    monkeypatch.setattr(fused.fft, 'conv', bad)
    clock.seconds = {'fft': 1e-3}
    with caplog.at_level(logging.WARNING):
        prepack(conv, x)
    assert f'fft is left out for x {tuple(x.shape)}: {reason}' in caplog.text
    assert difference(conv(x), exact(conv, x)) < TOLERANCE[torch.float32]


@torch.no_grad()
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_images_that_can_judge_nothing(value, clock):
    conv, x = convolution('depthwise')
    x[0, 0, 0, 0] = value
    prepack(conv, x)
    assert not conv.kept._fastest


@torch.no_grad()
def test_fft_steps_back_where_it_is_inaccurate(clock):
    """The choice is for such a size, the accuracy of each call's own values."""
    conv, x = convolution('depthwise')
    clock.seconds = {'fft': 0.5}
    prepack(conv, x)
    x = x.clone()
    x[:, :, 2, 3] = 1e6
    y, expected = conv(x), exact(conv, x)
    far = (..., slice(12, None), slice(None))
    x[:, :, 2, 3] = 0.
    assert difference(conv(x), exact(conv, x)) < TOLERANCE[torch.float32]
    assert difference(y[far], expected[far]) < TOLERANCE[torch.float32]


@torch.no_grad()
def test_a_kept_transform_follows_the_weight(clock):
    conv, x = convolution('depthwise', 'gelu')
    clock.seconds = {'fft': 0.5}
    prepack(conv, x)
    for factor in (1, 2, 3):
        conv.weight.mul_(factor)
        assert difference(conv(x), exact(conv, x)) < TOLERANCE[torch.float32]
    kept = conv.kept._derived[1]
    conv(x)
    assert conv.kept._derived[1] is kept and kept.is_complex()


def test_nothing_is_measured_where_the_result_is_not_all_that_counts(clock):
    conv, x = convolution('depthwise')
    with torch.autocast('cpu', dtype=torch.bfloat16):
        prepack(conv, x)
    assert not conv.kept._fastest
    with pytest.raises(ValueError, match='model must be in evaluation mode to be measured with images'):
        prepack(conv.train(), x)


@torch.no_grad()
def test_measurements_are_not_copied_to_other_machines(clock):
    conv, x = convolution('pointwise')
    prepack(conv, x)
    file = io.BytesIO()
    torch.save(conv, file)
    file.seek(0)
    for twin in (copy.deepcopy(conv), torch.load(file, weights_only=False)):
        assert not twin.kept._fastest and twin.kept._derived is None
        assert difference(twin(x), exact(conv, x)) < TOLERANCE[torch.float32]
    assert conv.kept._fastest


@torch.no_grad()
def test_whole_models_and_no_hooks_left():
    model = timm.create_model('smpconv_mobile31', num_classes=7).eval()
    merged = reparameterize_model(model)
    x = torch.randn(2, 3, 64, 64)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        fast = prepack(copy.deepcopy(merged).to(memory_format=memory_format), x.contiguous(memory_format=memory_format))
        assert difference(fast(x.contiguous(memory_format=memory_format)), model(x)) < 1e-4
        convolutions = [m for m in fast.modules() if isinstance(m, MergedConv2d)]
        assert all(m.kept._fastest for m in convolutions if m.kernel_size != (1, 1) or m.groups == 1)
        assert not any(m._forward_pre_hooks for m in fast.modules())
    with pytest.raises(ValueError, match='x must be'):
        prepack(fast, torch.randn(1, 5, 64, 64))
    assert not any(m._forward_pre_hooks for m in fast.modules())


@torch.no_grad()
@pytest.mark.parametrize('fastest', ['fft', 'native'])
@pytest.mark.parametrize('make,shape', [
    (lambda: MergedConv1d(3, 5, 40, causal=True), (2, 3, 40)),
    (lambda: MergedConv1d(3, 5, 21, padding=10), (2, 3, 40)),  # x is padded before it is convolved
    (lambda: MergedLargeConv2d(3, 5, (9, 17)), (2, 3, 8, 11)),
])
def test_convolutions_over_channels(make, shape, fastest, monkeypatch):
    clock, seen = Clock(), []
    by_fft, direct = dense.spectra.conv, dense._direct

    def slow(name, function):
        def run(*args):
            clock.now += 0.5 if name == fastest else 1.
            seen.append(name)
            return function(*args)
        return run

    monkeypatch.setattr(timing, '_clock', clock)
    monkeypatch.setattr(dense.spectra, 'conv', slow('fft', by_fft))
    monkeypatch.setattr(dense, '_direct', slow('native', direct))
    conv, x = make().eval(), torch.randn(shape)
    with torch.no_grad():
        expected = conv.double()(x.double())
    conv.float()
    prepack(conv, x)
    assert {'fft', 'native'} <= set(seen)
    seen.clear()
    assert difference(conv(x), expected) < TOLERANCE[torch.float32]
    assert set(seen) == {fastest}


@pytest.mark.parametrize('name,args,shape', [
    ('smpconv_mobile31', dict(kernel_sizes=(9, 7, 7, 5), dims=(8,) * 4), (0, 3, 64, 64)),
    ('smpconv_resnet_cifar10', dict(dims=(4,), kernel_size=9), (0, 3, 16, 16)),
    ('smpconv_tcn_ct', dict(depth=1), (0, 3, 182)), ('smpconv_tcn_pmnist', dict(depth=1), (0, 1, 28, 28))])
def test_an_empty_batch_measures_nothing(name, args, shape):
    model = timm.create_model(name, **args, inference_mode=True).eval()
    images = torch.zeros(shape)
    assert prepack(model, images)(images).shape == (0, model.num_classes)
