"""The convolution as a product of spectra (`torch.fft`), in float32 at least.

Shapes: B batch, C channels, H and W height and width, KH and KW height and width of the kernel, H' and W' of the
transforms. A spectrum is (…, W' // 2 + 1, H'), as transforms of contiguous columns need no copy.

The cost hardly depends on the kernel's size. Errors are relative to the largest value of the whole plane, not of the
window under the kernel: far from a pixel 10⁶ times larger than the others the output is wrong by 1.8e-3 where a direct
convolution is wrong by 1.3e-6. One Inf or NaN spoils its whole plane (H, W), and magnitudes near the largest of the
dtype overflow. `is_accurate` finds planes with a peak, not those of which a whole part is large; `is_in_range` and it
find what would overflow.
"""
import math
from typing import Any, Iterator, Optional, Tuple

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


def transform(weight: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """The transform of a kernel (C, 1, KH, KW) for maps H×W, (C, W' // 2 + 1, H'), conjugate."""
    kh, kw = weight.shape[2:]
    size = fast_length(h + kh // 2), fast_length(w + kw // 2)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    rows = torch.fft.rfft(F.pad(weight[:, 0].to(dtype), (0, size[1] - kw)).roll(-(kw // 2), 2))
    columns = F.pad(rows.mT, (0, size[0] - kh)).roll(-(kh // 2), 2)
    # conj_physical, as a lazy conj() is not resolved when a compiled graph calls the operator (torch 2.15).
    return torch.fft.fft(columns).conj_physical_()


def conv(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor] = None,
        kernel: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """The convolution, (B, C, H, W). `kernel` is the transform of the weight, computed if not given."""
    size = _size(x, weight.shape[2], weight.shape[3])
    if kernel is None:
        kernel = transform(weight, x.shape[2], x.shape[3])
    y = torch.empty_like(x)
    for chunk in _chunks(x, size):
        _place(y[chunk], _spectrum(x[chunk], size).mul_(kernel), size, bias)
    return y


def weight_gradient(grad: torch.Tensor, x: torch.Tensor, kh: int, kw: int) -> torch.Tensor:
    """The weight gradient of `conv`, (C, 1, KH, KW), in float32 at least.

    A gradient that is exactly zero, of a tap that meets nothing but zeros and padding, is zero here too. Otherwise Adam
    would make whole steps out of rounding noise.
    """
    size = _size(x, kh, kw)
    return _with_exact_zeros(_correlation(grad, x, size, kh, kw), grad, x, size)


def gradients(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Both gradients of `conv`, with regard to x and weight, from one transform of grad."""
    kh, kw = weight.shape[2:]
    size = _size(x, kh, kw)
    total: Any = None
    kernel = transform(weight.flip(2, 3), x.shape[2], x.shape[3])
    dx = torch.empty_like(grad)
    for chunk in _chunks(x, size):
        spectrum = _spectrum(grad[chunk], size)
        product = _spectrum(x[chunk], size).mul_(spectrum.conj()).sum(0)
        total = product if total is None else total.add_(product)
        _place(dx[chunk], spectrum.mul_(kernel), size)
    return dx, _with_exact_zeros(_lags(total, size, kh, kw), grad, x, size)


def is_accurate(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether no plane has a peak that drowns the rest of it, and nothing overflows: see the top of this file."""
    # Not by norms: of infinite order they take 20 times as long as extrema (torch 2.14).
    dtype = torch.promote_types(x.dtype, torch.float32)
    peak = torch.maximum(x.amax((2, 3)), -x.amin((2, 3))).to(dtype)  # (B, C)
    rest = x.abs().sum((2, 3), dtype=dtype) - peak
    doubtful = ~(peak * (x[0, 0].numel() - 1) <= PEAK * rest)  # with the zeros among the others
    if doubtful.any():
        others = x[doubtful].count_nonzero((1, 2)) - 1
        if not (peak[doubtful] * others <= PEAK * rest[doubtful]).all():
            return False
    return _range(peak.amax().item(), weight, x.shape[2:]) < 1


def is_in_range(grad: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether `weight_gradient` overflows for finite inputs only where a direct correlation does."""
    found = _range(_largest(grad), x, x.shape[2:])
    return not (math.isfinite(found) and found >= 1)


def _largest(x: torch.Tensor) -> float:
    """The largest magnitude."""
    return max(x.amax().item(), -x.amin().item())


def _range(largest: float, t: torch.Tensor, size: Tuple[int, ...]) -> float:
    """Upper bound on intermediate values, as a fraction of the dtype's maximum; NaN or infinity for such inputs."""
    dtype = torch.promote_types(t.dtype, torch.float32)
    # Sums over the two planes and the inverse transform, of at most twice the length.
    return largest * (_largest(t) / torch.finfo(dtype).max) * (4. * size[0] * size[1]) ** 3


def _size(x: torch.Tensor, kh: int, kw: int) -> Tuple[int, int]:
    """The length of the transforms, H' and W'."""
    return fast_length(x.shape[2] + kh // 2), fast_length(x.shape[3] + kw // 2)


def _spectrum(x: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
    """The transform of x (…, H, W), zeros behind it, (…, W' // 2 + 1, H')."""
    padded = x.new_zeros((*x.shape[:-1], size[1]), dtype=torch.promote_types(x.dtype, torch.float32))
    padded[..., :x.shape[-1]] = x  # contiguous and padded in one copy
    # Rows first, as rows of zeros need none: (1, 384, 14, 14) to 28×28 0.67 ms, `rfft2` 0.76, and back 0.7 and 1.0.
    return torch.fft.fft(torch.fft.rfft(padded).mT, size[0])


def _place(y: torch.Tensor, spectrum: torch.Tensor, size: Tuple[int, int], bias: Optional[torch.Tensor] = None) -> None:
    """Write the inverse transform, cropped, into y."""
    rows = torch.fft.ifft(spectrum)[..., :y.shape[2]].mT
    piece = torch.fft.irfft(rows, size[1])[..., :y.shape[3]]
    y.copy_(piece if bias is None else piece.add_(bias[:, None, None]))


def _correlation(grad: torch.Tensor, x: torch.Tensor, size: Tuple[int, int], kh: int, kw: int) -> torch.Tensor:
    total: Any = None
    for chunk in _chunks(x, size):
        product = _spectrum(grad[chunk], size).conj_physical_().mul_(_spectrum(x[chunk], size)).sum(0)
        total = product if total is None else total.add_(product)
    return _lags(total, size, kh, kw)


def _lags(spectrum: torch.Tensor, size: Tuple[int, int], kh: int, kw: int) -> torch.Tensor:
    """The products' sums for every tap, (C, 1, KH, KW)."""
    rows = torch.fft.ifft(spectrum).roll(kh // 2, -1)[..., :kh].mT
    return torch.fft.irfft(rows, size[1]).roll(kw // 2, -1)[:, None, :, :kw]


def _with_exact_zeros(dw: torch.Tensor, grad: torch.Tensor, x: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
    """dw, where no product that a tap sums is other than zero, zero."""
    def pairs(grad, x):  # products that a tap sums
        return _correlation(grad != 0, x != 0, size, *dw.shape[2:])

    if dw.device.type != 'cpu':  # a selection would wait for the device
        return dw.masked_fill(pairs(grad, x) < 0.5, 0)
    noise = _norms(grad, dw.dtype) * _norms(x, dw.dtype) * (torch.finfo(dw.dtype).eps / math.sqrt(size[0] * size[1]))
    suspect = ((dw.abs() <= _NOISE * noise[:, None, None, None]) & (dw != 0)).flatten(1).any(1)  # (C,)
    channels = suspect.nonzero().flatten()
    if len(channels):
        dw[channels] = dw[channels].masked_fill(pairs(grad[:, channels], x[:, channels]) < 0.5, 0)
    return dw


def _norms(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The Euclidean norm of every channel, (C,)."""
    return torch.stack([image.to(dtype).square().sum((1, 2)) for image in x]).sum(0).sqrt()


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
