"""Convolutions in one pass against float64, and the copies of weights that `prepack` lets a merged model keep."""
import copy
import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TOLERANCE, difference, small_model
from timm.utils import reparameterize_model
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from timm_smpconv import RepSMPConv2d, prepack
from timm_smpconv.layers.merged import MergedConv2d
from timm_smpconv.layers.rep_conv import ConvNorm
from timm_smpconv.ops import Kept, _private, conv2d_in_steps, fused, fused_conv2d, use_backend
from timm_smpconv.ops.dispatch import cpu

BFLOAT16 = pytest.param(torch.bfloat16, marks=pytest.mark.skipif(
    torch.bfloat16 not in _private.onednn_dtypes(), reason='oneDNN computes bfloat16 on CPUs with AVX-512 only'))
ACTIVATE = {'none': lambda y: y, 'relu': torch.relu, 'gelu': F.gelu}
# (channels, channels out, groups, kernel, stride, padding, dilation, (H, W))
GEOMETRIES = {
    'pointwise': (48, 80, 1, (1, 1), (1, 1), (0, 0), (1, 1), (7, 9)),
    'stem': (3, 24, 1, (3, 3), (2, 2), (1, 1), (1, 1), (16, 19)),
    'downsampling': (40, 40, 40, (3, 3), (2, 2), (1, 1), (1, 1), (9, 14)),
    'grouped and dilated': (32, 64, 4, (3, 5), (1, 2), (2, 0), (2, 1), (11, 12)),
    'small': (24, 24, 24, (5, 5), (1, 1), (2, 2), (1, 1), (10, 6)),
    'large': (24, 24, 24, (15, 27), (1, 1), (7, 13), (1, 1), (17, 20)),
    'larger than the map': (40, 40, 40, (51, 31), (1, 1), (25, 15), (1, 1), (6, 13)),
}


def make(geometry, batch=2, dtype=torch.float32):
    chs, out_chs, groups, kernel, stride, padding, dilation, size = GEOMETRIES[geometry]
    x = torch.randn(batch, chs, *size).to(dtype, memory_format=torch.channels_last)
    weight = (torch.randn(out_chs, chs // groups, *kernel) / (chs // groups * kernel[0] * kernel[1]) ** 0.5).to(dtype)
    rest = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    return x, weight, torch.randn(out_chs).to(dtype), rest


def exact(x, weight, bias, rest, activation='none', residual=None):
    y = ACTIVATE[activation](F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), **rest))
    return y if residual is None else y + residual.double()


@pytest.fixture(autouse=True)
def enabled(monkeypatch):
    """One pass is on by default on CPUs with AVX-512 and AVX2 only, and right on all that oneDNN supports."""
    monkeypatch.setattr(cpu, 'HERE', cpu.CPU('AVX512', _private.onednn_dtypes()))


@pytest.fixture
def passes(monkeypatch):
    """Counts the convolutions computed step by step."""
    steps = []

    def counting(*args):
        steps.append(args)
        return conv2d_in_steps(*args)

    monkeypatch.setattr(fused, 'conv2d_in_steps', counting)
    return steps


@torch.no_grad()
@pytest.mark.parametrize('dtype', [torch.float32, BFLOAT16])
@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_one_pass_equals_float64(geometry, dtype, passes):
    for batch, activation, with_bias, with_residual in (
            (1, 'none', True, False), (3, 'relu', False, False), (2, 'gelu', True, False), (3, 'none', True, True),
            (2, 'gelu', False, True), (2, 'relu', True, True)):
        x, weight, bias, rest = make(geometry, batch, dtype)
        bias = bias if with_bias else None
        residual = None
        if with_residual:
            residual = torch.randn(exact(x, weight, bias, rest).shape).to(dtype, memory_format=torch.channels_last)
        before = [None if t is None else t.clone() for t in (x, weight, bias, residual)]
        expected = exact(x, weight, bias, rest, activation, residual)
        tolerance = TOLERANCE[dtype] * (1 if activation == 'none' else 5)  # it may leave little of a channel's values
        kept = Kept()
        for keep in (None, kept, kept):
            y = fused_conv2d(x, weight, bias, **rest, activation=activation, residual=residual, kept=keep)
            assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
            assert difference(y, expected) < tolerance
        for t, saved in zip((x, weight, bias, residual), before):
            assert t is None or torch.equal(t, saved)
    assert not passes


@torch.no_grad()
@pytest.mark.parametrize('activation', ACTIVATE)
@pytest.mark.parametrize('geometry', ['pointwise', 'large'])
def test_nan_is_kept_and_stays_in_its_image(geometry, activation):
    x, weight, bias, rest = make(geometry, 3)
    expected = fused_conv2d(x, weight, bias, **rest, activation=activation)
    x[1, 3, 2, 1] = torch.nan
    y = fused_conv2d(x, weight, bias, **rest, activation=activation)
    assert torch.equal(y.isnan(), exact(x, weight, bias, rest, activation).isnan()) and y.isnan().any()
    assert torch.equal(y[[0, 2]], expected[[0, 2]])


def recorded(x, weight, bias, rest):
    weight.requires_grad_()
    with torch.enable_grad():
        y = fused_conv2d(x, weight, bias, **rest, activation='gelu')
    cotangent = torch.randn(y.shape)
    grad, = torch.autograd.grad(y, weight, cotangent)
    weight64 = weight.detach().double().requires_grad_()
    with torch.enable_grad():
        exact_grad, = torch.autograd.grad(exact(x, weight64, bias, rest, 'gelu'), weight64, cotangent.double())
    assert difference(grad, exact_grad) < TOLERANCE[torch.float32]
    return y


def tangent(x, weight, bias, rest):
    direction = torch.randn(x.shape).contiguous(memory_format=torch.channels_last)
    with forward_ad.dual_level():
        y, dy = forward_ad.unpack_dual(fused_conv2d(forward_ad.make_dual(x, direction), weight, bias, **rest))
    assert difference(dy, exact(direction, weight, None, rest)) < TOLERANCE[torch.float32]
    return F.gelu(y)


def forced(x, weight, bias, rest):
    with use_backend('native'):
        return fused_conv2d(x, weight, bias, **rest, activation='gelu')


def lowered(x, weight, bias, rest):
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y = fused_conv2d(x, weight, bias, **rest, activation='gelu')
    assert y.dtype == torch.bfloat16
    return y


def switched_off(x, weight, bias, rest):
    with torch.backends.mkldnn.flags(enabled=False):
        return fused_conv2d(x, weight, bias, **rest, activation='gelu')


def counted(x, weight, bias, rest):
    with FlopCounterMode(display=False) as counter:
        y = fused_conv2d(x, weight, bias, **rest, activation='gelu')
    assert counter.get_total_flops() == 2 * y.numel() * weight[0].numel()
    return y


@torch.no_grad()
@pytest.mark.filterwarnings('error::torch.jit.TracerWarning')
@pytest.mark.parametrize('call,tolerance', [
    (recorded, 1e-5), (tangent, 1e-5), (forced, 1e-5), (lowered, TOLERANCE[torch.bfloat16]), (switched_off, 1e-5),
    (counted, 1e-5),
    (lambda x, w, b, rest: fused_conv2d(x.contiguous(), w, b, **rest, activation='gelu'), 1e-5),
    (lambda x, w, b, rest: fused_conv2d(x.double(), w.double(), b.double(), **rest, activation='gelu'), 1e-12),
    (lambda x, w, b, rest: torch.vmap(lambda x: fused_conv2d(x[None], w, b, **rest, activation='gelu')[0])(x), 1e-5),
    (lambda x, w, b, rest: torch.jit.trace(lambda x: fused_conv2d(x, w, b, **rest, activation='gelu'), x)(x), 1e-5),
])
@pytest.mark.parametrize('geometry', ['pointwise', 'large'])
def test_step_by_step_where_one_pass_would_not_do(geometry, call, tolerance, passes):
    x, weight, bias, rest = make(geometry)
    y = call(x, weight, bias, rest)
    assert passes
    assert difference(y, exact(x, weight, bias, rest, 'gelu')) < tolerance


@torch.no_grad()
def test_few_channels_in_bfloat16_return():
    """oneDNN never does, see `geometry.working_dtype`."""
    x = torch.randn(1, 8, 36, 36).to(torch.bfloat16, memory_format=torch.channels_last)
    weight = torch.randn(8, 1, 17, 17).bfloat16() / 17
    rest = dict(padding=(8, 8), groups=8)
    assert difference(fused_conv2d(x, weight, **rest), exact(x, weight, None, rest)) < TOLERANCE[torch.bfloat16]


@torch.no_grad()
def test_bad_input_is_refused_as_by_the_standard_operators():
    x, weight, bias, rest = make('pointwise')
    for wrong in (x[:, :-1], x.double(), x[0, 0]):
        if wrong.ndim == 4:
            wrong = wrong.contiguous(memory_format=torch.channels_last)
        with pytest.raises((RuntimeError, ValueError)):
            fused_conv2d(wrong, weight, bias)
    with pytest.raises(RuntimeError):
        fused_conv2d(x, weight, bias, residual=torch.randn(2, 3, 7, 9).contiguous(memory_format=torch.channels_last))
    with pytest.raises(RuntimeError):
        fused_conv2d(x, torch.randn(8, 48, 11, 11))
    wide = torch.randn(1, 80, 1, 1)
    assert difference(fused_conv2d(x, weight, bias, residual=wide), exact(x, weight, bias, rest, residual=wide)) < 1e-5
    assert fused_conv2d(x[:0], weight, bias, activation='gelu').shape == (0, 80, 7, 9)
    with pytest.raises(ValueError, match="activation must be one of none, relu, gelu, got 'silu'"):
        MergedConv2d(3, 4, (1, 1), activation='silu')


def merged_model(**kwargs):
    return reparameterize_model(small_model(**kwargs)).to(memory_format=torch.channels_last)


@pytest.fixture
def photos():
    return torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
@pytest.mark.parametrize('dtype', [torch.float32, BFLOAT16])
def test_a_merged_model_in_one_pass_and_prepacked(photos, dtype, passes):
    model = small_model(dims=(24, 32, 40, 48))
    merged = reparameterize_model(model)
    expected = model(photos)
    merged = merged.to(dtype, memory_format=torch.channels_last)
    x = photos.to(dtype)
    y = merged(x)
    assert not passes
    assert difference(y, expected) < TOLERANCE[dtype]
    again = prepack(merged)
    assert again is merged
    for _ in range(2):
        assert torch.equal(merged(x), y)
    assert difference(merged(x[:1]), expected[:1]) < TOLERANCE[dtype]
    assert difference(merged(x.contiguous()), expected) < TOLERANCE[dtype]


@torch.no_grad()
def test_a_changed_weight_is_packed_again(photos):
    merged = prepack(merged_model())
    merged(photos)
    changes = [
        lambda m: setattr(m.stages[0].blocks[1].pw1, 'activation', 'none'),
        lambda m: m.stages[0].blocks[0].pw1.weight.mul_(2),
        lambda m: m.load_state_dict({k: v * 1.5 for k, v in m.state_dict().items()}),
        lambda m: setattr(m.stages[1].blocks[0].dwconv.weight, 'data', m.stages[1].blocks[0].dwconv.weight * 3),
        lambda m: m.bfloat16(),
        lambda m: m.float(),
        lambda m: m.stages[0].blocks[1].pw2.weight.detach().zero_(),
    ]
    seen = [merged(photos)]
    for change in changes:
        change(merged)
        x = photos.to(merged.head.fc.weight.dtype)
        with use_backend('native'):
            expected = merged(x)
        seen.append(merged(x))
        assert difference(seen[-1], expected) < TOLERANCE[x.dtype]
        assert not torch.equal(seen[-1], seen[-2])


@torch.no_grad()
@pytest.mark.parametrize('way', ['functional_call', 'data twice', 'there and back'])
def test_no_other_weight_is_taken_for_the_packed_one(way):
    conv = prepack(RepSMPConv2d(64, 13).eval().fuse() if way == 'data twice' else pointwise(512))
    x = torch.randn(1, conv.in_channels, 5, 6).contiguous(memory_format=torch.channels_last)
    conv(x)
    base = conv.weight.clone()
    for i in range(6):
        weights = {'weight': conv.weight, 'bias': conv.bias}
        if way == 'functional_call':
            weights['weight'] = base * (i + 2)
            y = torch.func.functional_call(conv, weights, x)
        else:
            if way == 'data twice':
                conv.weight.data = conv.weight.data * 2
                conv.weight.data = conv.weight.data * 2
            else:
                conv.bfloat16().float()
            y = conv(x)
        expected = F.conv2d(x, weights['weight'], weights['bias'], padding=conv.padding, groups=conv.groups)
        assert difference(y, expected) < TOLERANCE[torch.float32]
    assert conv.kept._derived is not None


def pointwise(channels):
    return ConvNorm(torch.nn.Conv2d(channels, channels, 1)).eval().fuse()


def test_traced_merged_models(photos):
    merged = merged_model()
    with torch.no_grad():
        expected = merged(photos)
        scripted = torch.jit.script(torch.fx.symbolic_trace(merged))
        assert difference(scripted(photos), expected) < TOLERANCE[torch.float32]


def test_a_prepacked_model_is_copied_saved_trained_and_scripted(photos):
    merged = prepack(merged_model())
    with torch.no_grad():
        expected = merged(photos)
    file = io.BytesIO()
    torch.save(merged, file)
    file.seek(0)
    for twin in (copy.deepcopy(merged), torch.load(file, weights_only=False)):
        with torch.no_grad():
            assert torch.equal(twin(photos), expected)
    assert merged.state_dict().keys() == merged_model().state_dict().keys()
    assert difference(torch.jit.script(merged)(photos), expected) < TOLERANCE[torch.float32]
    assert not any(p.requires_grad for p in merged.parameters())
    merged.requires_grad_(True)
    optimizer = torch.optim.Adam(merged.parameters(), lr=0.1, fused=True)
    merged(photos).square().mean().backward()
    with torch.no_grad():
        merged(photos)
    optimizer.step()
    with torch.no_grad(), use_backend('native'):
        after = merged(photos)
    with torch.no_grad():
        assert difference(merged(photos), after) < TOLERANCE[torch.float32]
    assert difference(after, expected) > 1e-3


def test_threads_share_a_prepacked_model():
    merged = prepack(merged_model())
    images = [torch.randn(1 + i % 3, 3, 64, 64).contiguous(memory_format=torch.channels_last) for i in range(12)]
    with torch.inference_mode(), use_backend('native'):
        expected = [merged(x) for x in images]

    def run(x):
        with torch.inference_mode():
            return merged(x)

    with ThreadPoolExecutor(4) as pool:
        for y, e in zip(pool.map(run, images), expected):
            assert difference(y, e) < TOLERANCE[torch.float32]


def test_an_unmerged_model_cannot_be_prepacked():
    with pytest.raises(ValueError, match=r'model must be merged \(timm.utils.reparameterize_model\), got SMPConvNet'):
        prepack(small_model())


@pytest.mark.parametrize('isa', ['AVX2', 'ALL'])
def test_onednn_has_no_reference_program_behind_what_is_fused(isa):
    """`ONEDNN_VERBOSE=1` prints the program of every call. Reference programs are loops, 100 times slower."""
    code = '''
import sys, torch
from timm_smpconv.ops import Kept, fused
from timm_smpconv.ops.dispatch import cpu
sys.path[:0] = sys.argv[1:]
from test_fused import GEOMETRIES, make
cpu.HERE = cpu.HERE._replace(capability='AVX512')
with torch.no_grad():
    for geometry in GEOMETRIES:
        for activation, adds in (('none', False), ('gelu', False), ('none', True)):
            x, weight, bias, rest = make(geometry, 2)
            y = fused.fused_conv2d(x, weight, bias, **rest)
            fused.fused_conv2d(
                x, weight, bias, **rest, activation=activation, residual=y if adds else None,
                kept=Kept())
'''
    here, root = Path(__file__).parent, Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, '-c', code, str(here), str(here.parent), str(root / 'weights')], cwd=root, capture_output=True,
        text=True, env=dict(os.environ, ONEDNN_VERBOSE='1', ONEDNN_MAX_CPU_ISA=isa, PYTHONPATH=str(root)))
    assert result.returncode == 0, result.stderr
    fused_calls = [line for line in result.stdout.splitlines() if 'exec' in line and 'post-ops' in line]
    programs = {tuple(line.split(',')[5:7]) for line in fused_calls}  # ('convolution', 'brgconv_1x1:avx2'), say
    assert {kind for kind, _ in programs} >= {'convolution'}
    assert not [program for _, program in programs if 'ref' in program], programs


@torch.no_grad()
@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_a_bias_with_strides(geometry):
    """oneDNN takes a bias for contiguous."""
    x, weight, bias, rest = make(geometry)
    for strided in (bias[:, None].repeat(1, 3)[:, 1], bias[:1].expand_as(bias)):
        y = fused_conv2d(x, weight, strided, **rest)
        assert difference(y, exact(x, weight, strided, rest)) < TOLERANCE[torch.float32]
