"""The convolution as a product of spectra (`torch.fft`), in float32 at least.

Shapes: B batch, C channels, H and W height and width, K and L height and width of the kernel.

The cost hardly depends on the kernel's size. Errors are relative to the largest value of the whole plane, not of the
window under the kernel: far from a pixel 10⁶ times larger than the others the output is wrong by 1.8e-3 where a direct
convolution is wrong by 1.3e-6. One Inf or NaN spoils its whole plane (H, W), and magnitudes near the largest of the
dtype overflow. `is_accurate` and `is_in_range` say where this does not matter.
"""
import math
from typing import Iterator, Optional, Tuple

import torch
import torch.nn.functional as F

# Largest ratio of a plane's peak to the mean magnitude of its other nonzero values at which a transform is about as
# accurate as a direct convolution: 5 for normal numbers, behind a ReLU too.
PEAK = 64
# Weight gradients below this many units of rounding noise are checked for being exactly zero. Noise reaches 6 units.
_NOISE = 64


def unsupported(x: torch.Tensor) -> Optional[str]:
    """Why it cannot run for this x."""
    if x.device.type not in ('cpu', 'cuda', 'meta'):
        return f'fft runs on cpu and cuda only, x is on {x.device}'
    return None


def conv(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    """The convolution, (B, C, H, W)."""
    k, l = weight.shape[2:]
    h, w = x.shape[2:]
    size = (fast_length(h + k // 2), fast_length(w + l // 2))
    dtype = torch.promote_types(x.dtype, torch.float32)
    kernel = F.pad(weight[:, 0].to(dtype), (0, size[1] - l, 0, size[0] - k)).roll((-(k // 2), -(l // 2)), (1, 2))
    # conj_physical, as a lazy conj() is not resolved when a compiled graph calls the operator (torch 2.15).
    kernel = torch.fft.rfft2(kernel).conj_physical_()
    y = torch.empty_like(x)
    for chunk in _chunks(x, size):
        spectrum = torch.fft.rfft2(x[chunk].to(dtype).contiguous(), s=size).mul_(kernel)
        piece = torch.fft.irfft2(spectrum, s=size)[:, :, :h, :w]
        y[chunk] = piece if bias is None else piece.add_(bias[:, None, None])
    return y


def corr(grad: torch.Tensor, x: torch.Tensor, k: int, l: int) -> torch.Tensor:
    """The weight gradient of `conv`, (C, 1, K, L), in float32 at least.

    A gradient that is exactly zero, of a tap that meets nothing but zeros and padding, is zero here too. Otherwise Adam
    would make whole steps out of rounding noise.
    """
    size = (fast_length(x.shape[2] + k // 2), fast_length(x.shape[3] + l // 2))
    dw = _correlation(grad, x, size, k, l)
    noise = _norms(grad, dw.dtype) * _norms(x, dw.dtype) * (torch.finfo(dw.dtype).eps / math.sqrt(size[0] * size[1]))
    if dw.device.type != 'cpu':  # a selection would wait for the device
        return dw.masked_fill(_correlation(grad != 0, x != 0, size, k, l) < 0.5, 0)
    suspect = ((dw.abs() <= _NOISE * noise[:, None, None, None]) & (dw != 0)).flatten(1).any(1)  # (C,)
    channels = suspect.nonzero().flatten()
    if len(channels):
        pairs = _correlation(grad[:, channels] != 0, x[:, channels] != 0, size, k, l)  # products that a tap sums
        dw[channels] = dw[channels].masked_fill(pairs < 0.5, 0)
    return dw


def is_accurate(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `conv` is about as accurate as a direct convolution: see the top of this file."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    peak = torch.linalg.vector_norm(x, math.inf, (2, 3), dtype=dtype)
    others = x.count_nonzero((2, 3)) - 1
    mean = (torch.linalg.vector_norm(x, 1, (2, 3), dtype=dtype) - peak) / others.clamp(min=1)
    return bool(((peak <= PEAK * mean) | (others < 1)).all()) and _range(peak, weight, x.shape[2:]) < 1


def is_in_range(grad: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether `corr` overflows for finite inputs only where a direct correlation does."""
    found = _range(grad, x, x.shape[2:])
    return not (math.isfinite(found) and found >= 1)


def _range(a: torch.Tensor, b: torch.Tensor, size: Tuple[int, ...]) -> float:
    """Upper bound on intermediate values, as a fraction of the dtype's maximum; NaN or infinity for such inputs."""
    largest = [max(abs(limit.item()) for limit in t.aminmax()) for t in (a, b)]
    dtype = torch.promote_types(a.dtype, torch.float32)
    # Sums over the two planes and the inverse transform, of at most twice the length.
    return largest[0] * (largest[1] / torch.finfo(dtype).max) * (4. * size[0] * size[1]) ** 3


def _correlation(grad: torch.Tensor, x: torch.Tensor, size: Tuple[int, int], k: int, l: int) -> torch.Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    total = None
    for chunk in _chunks(x, size):
        spectrum = torch.fft.rfft2(grad[chunk].to(dtype).contiguous(), s=size).conj_physical_()
        spectrum = spectrum.mul_(torch.fft.rfft2(x[chunk].to(dtype).contiguous(), s=size)).sum(0)
        total = spectrum if total is None else total.add_(spectrum)
    lags = torch.fft.irfft2(total, s=size).roll((k // 2, l // 2), (1, 2))
    return lags[:, None, :k, :l]


def _norms(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The Euclidean norm of every channel, (C,)."""
    return torch.linalg.vector_norm(x, 2, (0, 2, 3), dtype=dtype)


def fast_length(n: int) -> int:
    """The smallest fast transform length from n on: even, of small primes.

    (4, 384, 14, 14), `rfft2`: at 27 2.3 ms, at 28 1.4; (4, 192, 28, 28): at 45 3.1, at 48 2.4.
    """
    n += n % 2
    while True:
        rest = n
        for prime in (2, 3, 5, 7):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 2


def _chunks(x: torch.Tensor, size: Tuple[int, int]) -> Iterator[slice]:
    """The batch in pieces of about 1 MiB of spectrum: larger ones leave the cache and, on Linux, cost page faults.

    C 384, 14×14, 27×27, batch 16, weight gradient: 22 ms, 49 in one piece; C 64, 56×56, 51×51, output: 34 ms, 41.
    """
    if x.device.type != 'cpu':
        yield slice(None)
        return
    n = max(1, 2 ** 20 // (x.shape[1] * size[0] * (size[1] // 2 + 1) * 8))
    for start in range(0, x.shape[0], n):
        yield slice(start, start + n)
