"""Triton programs against `F.conv2d` in float64: in Triton's interpreter on small shapes, on a GPU at real sizes too.

Memory that is not written is NaN here.
"""
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import LAYOUTS, TOLERANCE, difference
from packaging.version import Version

from timm_smpconv import depthwise_conv2d
from timm_smpconv.ops import use_backend
from timm_smpconv.ops.autograd.depthwise import conv_op, weight_gradient_op
from timm_smpconv.ops.backends.triton import tiles

triton = pytest.importorskip('triton', reason='Triton is not installed')
ON_GPU = torch.cuda.is_available()
interpreted = pytest.mark.skipif(
    not ON_GPU and Version(np.__version__) >= Version('2.4') and Version(triton.__version__) < Version('3.8'),
    reason="Triton's interpreter takes arrays of one entry for numbers, which NumPy 2.4 refuses, before torch 2.14")
DEVICE = torch.device('cuda' if ON_GPU else 'cpu')
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [  # (B, C, H, W, K, L)
    (1, 1, 1, 1, 3, 3),
    (1, 1, 5, 5, 3, 3),
    (3, 2, 7, 7, 13, 13),  # K = 2H - 1
    (3, 2, 4, 4, 31, 31),  # K > 2H - 1
    (2, 3, 9, 17, 5, 31),
    (1, 2, 20, 6, 9, 3),
    (2, 1, 3, 33, 1, 7),
    (2, 1, 33, 3, 7, 1),
    (33, 1, 18, 18, 5, 5),  # more images than in half a tile
    (1, 2, 40, 40, 11, 11),  # several groups of rows in a tile
    (1, 1, 6, 128, 3, 15),
]
REAL = [(64, 128, 56, 56, 31, 31), (7, 256, 28, 28, 29, 29), (130, 96, 14, 14, 27, 27), (128, 1024, 7, 7, 13, 13)]


@pytest.fixture(autouse=True)
def poisoned():
    """Fresh memory is NaN; without a GPU, the interpreter's products take bfloat16, which 3.8's read as integers."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope='module')
def bfloat16_products():
    if ON_GPU:
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder
    product = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *args):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.cast_impl(t, tl.float32) for t in (a, b))
        return product(self, a, b, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, 'create_dot', create_dot)
        yield


def tensors(b, c, h, w, kh, kw, dtype):
    x, weight = torch.randn(b, c, h, w), torch.randn(c, 1, kh, kw) / (kh * kw) ** 0.5
    return [t.to(DEVICE, dtype) for t in (x, weight, torch.randn(c), torch.randn(b, c, h, w))]


def compare(x, weight, bias, cotangent, convolve=depthwise_conv2d):
    """Output and all gradients; the oracle runs on the CPU."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    wide = [t.detach().double().cpu().requires_grad_() for t in (x, weight, bias)]
    kh, kw = weight.shape[2:]
    expected = F.conv2d(*wide, padding=(kh // 2, kw // 2), groups=x.shape[1])
    with use_backend('triton'):
        actual = convolve(*leaves)
        grads = torch.autograd.grad(actual, leaves, cotangent)
    wanted = torch.autograd.grad(expected, wide, cotangent.double().cpu())
    for got, want in zip((actual, *grads), (expected, *wanted)):
        assert got.dtype == x.dtype and difference(got.cpu(), want) < TOLERANCE[x.dtype]
    return actual


@interpreted
@pytest.mark.parametrize('case,dtype', [
    *itertools.product(CASES, (torch.float32,)), *itertools.product(CASES[1:7:2], (torch.bfloat16, torch.float16)),
    *(itertools.product(REAL, DTYPES) if ON_GPU else [])], ids=str)
def test_output_and_gradients(case, dtype):
    compare(*tensors(*case, dtype=dtype))


@interpreted
@pytest.mark.parametrize('layout', LAYOUTS)
def test_layouts(layout):
    x, *rest = tensors(2, 3, 9, 12, 7, 5, dtype=torch.float32)
    x = LAYOUTS[layout](x)
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    y = compare(x, *rest)
    assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@interpreted
def test_autocast_does_not_round_the_gradient_of_the_weight():
    x, weight, bias, cotangent = tensors(3, 2, 9, 9, 5, 5, dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    with torch.autocast(DEVICE.type, torch.bfloat16), use_backend('triton'):
        y = depthwise_conv2d(*leaves)
    got = torch.autograd.grad(y, leaves, cotangent.to(y.dtype))
    assert y.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in got)
    wide = [t.detach().double().cpu().requires_grad_() for t in (x.to(torch.bfloat16), weight, bias)]
    expected = F.conv2d(*wide, padding=2, groups=2)
    wanted = torch.autograd.grad(expected, wide, cotangent.to(y.dtype).double().cpu())
    assert difference(y.cpu(), expected) < TOLERANCE[torch.bfloat16]
    assert difference(got[0].cpu(), wanted[0]) < TOLERANCE[torch.bfloat16]
    assert difference(got[1].cpu(), wanted[1]) < 1e-5


@interpreted
@pytest.mark.slow
def test_compile():
    x, weight, bias, cotangent = tensors(2, 3, 6, 6, 5, 5, dtype=torch.float32)

    def convolve(*inputs):
        return depthwise_conv2d(*inputs, backend='triton')

    compare(x, weight, bias, cotangent, torch.compile(convolve, backend='aot_eager', fullgraph=True))


@interpreted
def test_an_image_of_nan_stays_alone():
    x, weight, bias, _ = tensors(3, 2, 9, 9, 5, 5, dtype=torch.float32)
    with use_backend('triton'):
        clean = depthwise_conv2d(x, weight, bias)
        x[1] = float('nan')
        y = depthwise_conv2d(x, weight, bias)
    assert torch.equal(y[::2], clean[::2]) and y[1].isnan().all()


@pytest.mark.gpu  # Triton's interpreter runs programs one after another: it is deterministic whatever they do
def test_the_same_gradients_every_time():
    x, weight, _, cotangent = tensors(64, 96, 28, 28, 29, 29, dtype=torch.float32)
    runs = []
    for _ in range(2):
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        with use_backend('triton'):
            runs.append(torch.autograd.grad(depthwise_conv2d(*leaves), leaves, cotangent))
    assert all(itertools.starmap(torch.equal, zip(*runs)))


@interpreted
@pytest.mark.slow
def test_opcheck():
    x, weight, bias, cotangent = tensors(2, 3, 6, 6, 5, 5, dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(conv_op, (*leaves, 'triton'))
    torch.library.opcheck(weight_gradient_op, (cotangent.requires_grad_(), x, 5, 5, 'triton'))


@pytest.mark.parametrize('dtype,width,reason', [
    (torch.float64, 8, 'triton computes float32, bfloat16 and float16, x is torch.float64'),
    (torch.float32, 129, 'triton takes maps of at most 128 columns, x has 129'),
])
def test_what_it_cannot_run(dtype, width, reason):
    x = torch.zeros(1, 1, 2, width, dtype=dtype, device=DEVICE)
    with use_backend('triton'), pytest.raises(ValueError, match=reason):
        depthwise_conv2d(x, torch.zeros(1, 1, 3, 3, dtype=dtype, device=DEVICE))


def test_not_on_the_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    with use_backend('triton'), pytest.raises(ValueError, match='triton runs on cuda only'):
        depthwise_conv2d(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 3, 3))


@pytest.mark.parametrize('capability,room', [(80, 166912), (89, 101376), (90, 232448), (120, 101376)])
def test_tiles_fit(monkeypatch, capability, room):
    monkeypatch.setattr(tiles, 'limits', lambda x: (capability, room))
    for width, dtype in itertools.product((1, 7, 16, 17, 56, 64, 65, 128), DTYPES):
        x = torch.empty(1, 1, 1, width, dtype=dtype, device='meta')
        p = next(p for p in (16, 32, 64, 128) if width <= p)
        conv, gradient = tiles.conv_tile(x), tiles.gradient_tile(x)
        assert (conv.m + max(conv.n, p)) * p * x.element_size() * tiles.buffers(conv, x) <= room
        rows = max(1, min(gradient.m // p, 4))
        assert (rows + 1) * p * gradient.step * x.element_size() * tiles.buffers(gradient, x) <= room
        assert min(tiles.buffers(conv, x), tiles.buffers(gradient, x)) >= 1


@pytest.mark.slow
@pytest.mark.parametrize('capability,product', [(80, 'mma.sync'), (89, 'mma.sync'), (90, 'wgmma'), (100, 'tcgen05')])
def test_compiles_to_tensor_cores_without_a_gpu(tmp_path, capability, product):
    environ = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'}
    result = subprocess.run(
        [sys.executable, '-m', 'benchmarks.triton_report', '--capability', str(capability), '--shape', 'A', 'D',
         '--dtype', 'bfloat16', 'tf32', 'float32'],
        env={**environ, 'TRITON_CACHE_DIR': str(tmp_path)}, cwd=Path(__file__).parents[2],
        capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr  # nothing spills, everything fits
    lines = [line for line in result.stdout.splitlines() if line.startswith(('| conv |', '| products |'))]
    assert {line.split('|')[1].strip() for line in lines} == {'conv', 'products'}
    assert all((product in line) == ('float32' not in line) for line in lines), result.stdout
