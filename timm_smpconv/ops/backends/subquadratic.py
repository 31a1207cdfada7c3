"""The fused FFT of NVIDIA's `subquadratic_ops_torch`, where somebody has installed it. Only to be raced with others.

Read in version 0.3.1 (wheel `subquadratic-ops-torch-cu13`; version 0.2.1 for CUDA 12 does not have it). Its licence is
proprietary: it may be installed and used with NVIDIA's GPUs, not modified or passed on. Nothing of it is in this
package, which does not depend on it either.

Shapes: B batch, C channels, H and W height and width, K and L height and width of the kernel, N the length of the
transform, twice the larger of H and W rounded up to a power of two. For x (B, C, H, W) and a weight (C, N, N),
`fused_fft_conv2d` is the cyclic convolution of length N, from row and column N / 2 on:

    y[b, c, i, j] = Σ_uv  weight[c, u, v] x[b, c, (i + N/2 - u) mod N, (j + N/2 - v) mod N]        i < H, j < W

so tap (k, l) of a "same" convolution is weight[c, N/2 + K//2 - k, N/2 + L//2 - l]: the flipped kernel, with its centre
at (N/2, N/2). Its spectra are rounded to the dtype of x. Where a GPU has too little shared memory for N, it raises
RuntimeError.
"""
import importlib
import importlib.machinery
import importlib.util
import types
from typing import Optional

import torch
import torch.nn.functional as F

_PACKAGE, _MODULE = 'subquadratic_ops_torch', 'subquadratic_ops_torch.fused_fft_conv2d'


def unsupported(x: torch.Tensor) -> Optional[str]:
    """Why it cannot run for this x."""
    if x.device.type not in ('cuda', 'meta'):
        return f'subquadratic runs on cuda only, x is on {x.device}'
    if x.dtype not in (torch.float32, torch.bfloat16):
        # It has float16 as well, but divides spectra by N²: at N = 128 those of usual weights are subnormal.
        return f'subquadratic computes float32 and bfloat16, x is {x.dtype}'
    if max(x.shape[2:]) > 64:
        return f'subquadratic takes maps of at most 64×64, x has {x.shape[2]}×{x.shape[3]}'
    if not _installed():
        return f'{_PACKAGE} is not installed, or has no fused_fft_conv2d'
    return None


def conv(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    """(B, C, H, W) and (C, 1, K, L) with K < 2 H and L < 2 W → (B, C, H, W)."""
    n = length(x)
    y = _functions().fused_fft_conv2d(x.contiguous(), centred(weight.to(x.dtype), n), n)
    return y if bias is None else y + bias.to(y.dtype)[:, None, None]


def corr(grad: torch.Tensor, x: torch.Tensor, k: int, l: int) -> torch.Tensor:
    """(B, C, H, W) twice → (C, 1, K, L) with K < 2 H and L < 2 W.

    It computes an input gradient too, which is not used.
    """
    functions, n = _functions(), length(x)
    kernel = x.new_zeros(1, x.shape[1], n // 2 + 1, 2 * n)  # a spectrum, complex numbers as pairs
    spectrum = functions.fused_fft_conv2d_bwd(x.contiguous(), kernel, grad.contiguous())[1]
    top, left = n // 2 - k // 2, n // 2 - l // 2
    return functions.fused_rfft2d_bwd(spectrum)[0, :, None, top:top + k, left:left + l].flip(2, 3)


def length(x: torch.Tensor) -> int:
    """N, at least 8."""
    return max(8, 2 << (max(x.shape[2:]) - 1).bit_length())


def centred(weight: torch.Tensor, n: int) -> torch.Tensor:
    """(C, 1, K, L) → (C, N, N): flipped, its centre at (N/2, N/2)."""
    k, l = weight.shape[2:]
    top, left = n // 2 - k // 2, n // 2 - l // 2
    return F.pad(weight[:, 0].flip(1, 2), (left, n - left - l, top, n - top - k))


def _functions() -> types.ModuleType:
    return importlib.import_module(_MODULE)


def _installed() -> bool:
    # Of the package itself, whose import warns about drivers, nothing is run.
    package = importlib.util.find_spec(_PACKAGE)
    return package is not None and importlib.machinery.PathFinder.find_spec(
        _MODULE, package.submodule_search_locations) is not None
