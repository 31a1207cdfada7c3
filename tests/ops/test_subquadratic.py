"""The fused FFT of `subquadratic_ops_torch` against `F.conv2d`: how our convolution is laid out for it.

The package needs a GPU and is not installed. Its functions are stood in for by plain PyTorch, written from their
documentation: what is tested is padding, centring, cropping and which functions are called, not the package itself.
"""
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import TOLERANCE, difference

from timm_smpconv.ops.backends import subquadratic

CASES = [  # (B, C, H, W, K, L)
    (1, 1, 1, 1, 1, 1),
    (2, 3, 5, 5, 3, 3),
    (2, 3, 7, 4, 13, 7),  # K = 2H - 1, L = 2W - 1
    (1, 2, 8, 8, 15, 5),
    (3, 2, 9, 17, 1, 9),
    (1, 1, 64, 33, 127, 65),
]


def spectrum_of(weight, n):
    """Frequency-major, real and imaginary parts as pairs, divided by N²."""
    return torch.view_as_real(torch.fft.rfft2(weight, s=(n, n), norm='forward').transpose(-1, -2)).flatten(-2)


def complex_of(spectrum):
    return torch.view_as_complex(spectrum.unflatten(-1, (-1, 2)).contiguous()).transpose(-1, -2)


def fused_fft_conv2d(x, weight, fft_size):
    n, (h, w) = fft_size, x.shape[2:]
    assert n in (8, 16, 32, 64, 128) and max(h, w) <= n // 2 and weight.shape == (x.shape[1], n, n)
    assert x.dtype == weight.dtype
    y = torch.fft.irfft2(torch.fft.rfft2(x, s=(n, n)) * torch.fft.rfft2(weight), s=(n, n))
    return y[..., n // 2:n // 2 + h, n // 2:n // 2 + w]


def fused_fft_conv2d_bwd(x, kf, dy):
    """The gradients of the function above, in x and in its spectrum, summed over the batch."""
    n = kf.shape[-1] // 2
    assert kf.shape == (1, x.shape[1], n // 2 + 1, 2 * n) and dy.shape == x.shape
    weight = (torch.fft.irfft2(complex_of(kf), s=(n, n)) * n * n)[0].requires_grad_()
    x = x.detach().requires_grad_()
    dx, dw = torch.autograd.grad(fused_fft_conv2d(x, weight, n), (x, weight), dy)
    return dx, spectrum_of(dw[None], n)  # `fused_rfft2d_bwd` takes this back to dw


def fused_rfft2d_bwd(dkf):
    n = dkf.shape[-1] // 2
    return n * n * torch.fft.irfft2(complex_of(dkf), s=(n, n))


@pytest.fixture
def stand_in(monkeypatch):
    name = 'subquadratic_ops_torch.fused_fft_conv2d'
    module = types.ModuleType(name)
    for function in (fused_fft_conv2d, fused_fft_conv2d_bwd, fused_rfft2d_bwd):
        setattr(module, function.__name__, function)
    package = types.ModuleType('subquadratic_ops_torch')
    package.fused_fft_conv2d = module
    monkeypatch.setitem(sys.modules, 'subquadratic_ops_torch', package)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize('case', CASES, ids=str)
def test_output_and_gradient_of_the_weight(stand_in, case):
    b, c, h, w, k, l = case
    x, grad = torch.randn(b, c, h, w).double(), torch.randn(b, c, h, w).double()
    weight, bias = torch.randn(c, 1, k, l).double().requires_grad_(), torch.randn(c).double()
    expected = F.conv2d(x, weight, bias, padding=(k // 2, l // 2), groups=c)
    assert difference(subquadratic.conv(x, weight.detach(), bias), expected) < TOLERANCE[torch.float64]
    wanted, = torch.autograd.grad(expected, weight, grad)
    assert difference(subquadratic.corr(grad, x, k, l), wanted) < TOLERANCE[torch.float64]


@pytest.mark.parametrize('shape,dtype,device,reason', [
    ((1, 1, 8, 8), torch.float32, 'cpu', 'subquadratic runs on cuda only, x is on cpu'),
    ((1, 1, 8, 8), torch.float64, 'meta', 'subquadratic computes float32 and bfloat16, x is torch.float64'),
    ((1, 1, 8, 8), torch.float16, 'meta', 'subquadratic computes float32 and bfloat16, x is torch.float16'),
    ((1, 1, 8, 65), torch.float32, 'meta', 'subquadratic takes maps of at most 64×64, x has 8×65'),
])
def test_what_it_cannot_run(shape, dtype, device, reason):
    assert subquadratic.unsupported(torch.empty(shape, dtype=dtype, device=device)) == reason


@pytest.mark.parametrize('files,supported', [
    ((), False), (('__init__.py',), False), (('__init__.py', 'fused_fft_conv2d.py'), True)], ids=str)
def test_needs_the_package_and_does_not_import_it_to_find_out(tmp_path, monkeypatch, files, supported):
    folder = tmp_path / 'subquadratic_ops_torch'
    folder.mkdir()
    for name in files:
        (folder / name).write_text('raise RuntimeError("imported")')
    monkeypatch.setattr(sys, 'path', [str(tmp_path)] if files else [])
    reason = subquadratic.unsupported(torch.empty(1, 1, 64, 64, device='meta'))
    assert reason == (None if supported else 'subquadratic_ops_torch is not installed, or has no fused_fft_conv2d')
