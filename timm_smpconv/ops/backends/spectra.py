"""Convolutions over channels as products of spectra, and their gradients: one matrix product per frequency.

Shapes: B batch, I and O channels in and out, L size of the input in each of its one or two dimensions, K size of the
kernel, N size of the transforms, F number of frequencies, M rows and C columns of any matrix.

    y[b,o,n]  = Σ_ik w[o,i,k] x[b,i,n+k-p]      p: zeros in front of x, `before`
    dx[b,i,m] = Σ_ok w[o,i,k] g[b,o,m-k+p]
    dw[o,i,k] = Σ_bn g[b,o,n] x[b,i,n+k-p]

Of N samples, x is placed at p, w and g at 0. Then y = X conj(W) and dw = conj(G) X, both read from 0, and dx = G W,
read from p. Nothing that is read has wrapped around if N ≥ L + max(p, K - 1 - p).

Errors are relative to the largest value of all channels of an image or sequence, and one Inf or NaN spoils all of it.
"""
import math
from typing import Any, Iterator, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F

from .fft import PEAK, fast_length
from .native import memory_format

# Entries of a spectrum that are computed together, 4 MiB in float32. More leave the cache and cost page faults, ms on
# one core (AVX2), output of (4, 30, 16000): 230, in one piece 406.
_PIECE = 2 ** 19
# Larger magnitudes than two to this are scaled. Sums over 1000 channels and 10⁵ samples then stay in float32's range.
_EXPONENT = 30


class Kernel(NamedTuple):
    """The transform of a kernel."""
    spectrum: torch.Tensor  # (F, O, I), conjugate
    scale: torch.Tensor  # (), what the kernel was multiplied by


def conv(
        x: torch.Tensor,
        weight: torch.Tensor,
        before: Sequence[int],
        groups: int,
        kernel: Optional[Kernel] = None,
) -> torch.Tensor:
    """x (B, I, *L), weight (O, I / groups, *K) → (B, O, *L), in the dtype of x.

    Args:
        x: Of any floating point dtype; half precision is computed in float32.
        weight: Of any floating point dtype.
        before: p, for each dimension.
        groups: Of the channels.
        kernel: `transform(weight, ...)`, for one group only. Computed if not given.
    """
    y = empty(x, weight.shape[0])
    if groups > 1:
        for x_part, w_part, y_part in zip(x.chunk(groups, 1), weight.chunk(groups), y.chunk(groups, 1)):
            y_part.copy_(conv(x_part, w_part, before, 1))
        return y
    plan = _plan(x.shape[2:], weight.shape[2:], before)
    scale = _scale(x)
    if kernel is not None or x.shape[0] > weight.shape[0]:
        spectrum, w_scale = kernel or transform(weight, x.shape[2:], before)
        for b in plan.pieces(x, x.shape[0], max(weight.shape[:2])):
            plan.inverse(plan.forward(x[b], scale, before) @ spectrum.mT, y[b], (scale, w_scale))
    else:
        w_scale = _scale(weight)
        spectrum = plan.forward(x, scale, before)  # (F, B, I)
        for o in plan.pieces(x, weight.shape[0], max(x.shape[:2])):
            part = plan.forward(weight[o], w_scale).conj_physical_()
            plan.inverse(spectrum @ part.mT, y[:, o], (scale, w_scale))
    return y


def empty(x: torch.Tensor, channels: int) -> torch.Tensor:
    """A tensor of the batch, size, dtype and memory format of x (B, C, *L)."""
    shape = x.shape[0], channels, *x.shape[2:]
    return x.new_empty(shape) if x.ndim == 3 else torch.empty(
        shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def transform(weight: torch.Tensor, size: Sequence[int], before: Sequence[int]) -> Kernel:
    """weight (O, I, *K) for inputs of a size L."""
    scale = _scale(weight)
    return Kernel(_plan(size, weight.shape[2:], before).forward(weight, scale).conj_physical_(), scale)


def gradients(
        grad: torch.Tensor,
        x: Optional[torch.Tensor],
        weight: Optional[torch.Tensor],
        kernel_size: Sequence[int],
        before: Sequence[int],
        groups: int,
) -> Tuple[Any, Any]:
    """The gradients of `conv` with regard to x and weight, in the dtype of grad.

    Args:
        grad: Of the output, (B, O, *L).
        x: (B, I, *L), None if the weight's gradient is not needed.
        weight: (O, I / groups, *K), None if the input's gradient is not needed.
        kernel_size: K.
        before: p, for each dimension.
        groups: Of the channels.
    """
    if groups > 1:
        parts = [
            gradients(grad_part, x_part, w_part, kernel_size, before, 1)
            for grad_part, x_part, w_part in zip(
                grad.chunk(groups, 1),
                [None] * groups if x is None else x.chunk(groups, 1),
                [None] * groups if weight is None else weight.chunk(groups))]
        dxs, dws = zip(*parts)
        return None if weight is None else torch.cat(dxs, 1), None if x is None else torch.cat(dws)
    (batch, outputs), size = grad.shape[:2], grad.shape[2:]
    inputs = next(t.shape[1] for t in (x, weight) if t is not None)
    plan, scale = _plan(size, kernel_size, before), _scale(grad)
    dx: Any = None
    dw: Any = None
    total: Any = None
    w_spectrum: Any = None
    x_scale = w_scale = scale
    if weight is not None:
        dx, w_scale = empty(grad, weight.shape[1]), _scale(weight)
    if x is not None:
        dw, x_scale = grad.new_empty(outputs, x.shape[1], *kernel_size), _scale(x)
    if batch > outputs:
        if weight is not None:
            w_spectrum = plan.forward(weight, w_scale)  # (F, O, I)
        for b in plan.pieces(grad, batch, max(outputs, inputs)):
            g = plan.forward(grad[b], scale)  # (F, B', O)
            if weight is not None:
                plan.inverse(g @ w_spectrum, dx[b], (scale, w_scale), before)
            if x is not None:
                left, right = g.conj_physical_().mT, plan.forward(x[b], x_scale, before)
                total = left @ right if total is None else total.baddbmm_(left, right)
        if x is not None:
            plan.inverse(total, dw, (scale, x_scale))
    else:
        g = plan.forward(grad, scale)  # (F, B, O)
        if weight is not None:
            for i in plan.pieces(grad, inputs, max(batch, outputs)):
                plan.inverse(g @ plan.forward(weight[:, i], w_scale), dx[:, i], (scale, w_scale), before)
        if x is not None:
            g, x_spectrum = g.conj_physical_().mT, plan.forward(x, x_scale, before)
            for o in plan.pieces(grad, outputs, max(batch, inputs)):
                plan.inverse(g[:, o] @ x_spectrum, dw[o], (scale, x_scale))
    if x is not None:
        _clear_unmet(dw, grad, x, before)
    return dx, dw


def is_accurate(x: torch.Tensor) -> torch.Tensor:
    """Which images or sequences have no peak that drowns the rest, (B,): see the top of `fft`."""
    flat = x.detach().flatten(1).to(torch.promote_types(x.dtype, torch.float32))
    peak = torch.maximum(flat.amax(1), -flat.amin(1))
    rest = torch.linalg.vector_norm(flat, 1, 1) - peak
    accurate = peak * (flat.shape[1] - 1) <= PEAK * rest  # with zeros among the others
    if accurate.all():
        return accurate
    others = flat.count_nonzero(1) - 1
    return (peak * others <= PEAK * rest) & peak.isfinite()


def largest_seen(x: torch.Tensor, k: int) -> torch.Tensor:
    """The largest of each sample of x (…, L), at least 0, and the k - 1 samples before it."""
    n = x.shape[-1]
    if k >= n:
        return x.cummax(-1).values
    # Two blocks of k meet in each window: the largest of the first one's end, and of the second one's beginning.
    blocks = F.pad(x, (k - 1, -(n - 1) % k)).unflatten(-1, (-1, k))
    ends, beginnings = blocks.flip(-1).cummax(-1).values.flip(-1).flatten(-2), blocks.cummax(-1).values.flatten(-2)
    return torch.maximum(ends[..., :n], beginnings[..., k - 1:k - 1 + n])


def _clear_unmet(dw: torch.Tensor, grad: torch.Tensor, x: torch.Tensor, before: Sequence[int]) -> None:
    """Set the gradient of taps that meet only padding, and zeros before or behind all other values, to zero in place.

    Otherwise Adam would make whole steps out of rounding noise.
    """
    for d, p in enumerate(before, 2):
        (g_first, g_last), (x_first, x_last) = _ends(grad, d), _ends(x, d)
        low = (x_first[:, None] - g_last[:, :, None]).amin(0) + p  # (O, I)
        high = (x_last[:, None] - g_first[:, :, None]).amax(0) + p
        size = dw.shape[d]
        lowest, highest = (int(low.max()), int(high.min())) if dw.device.type == 'cpu' else (size, -1)
        for start, n in ((0, min(lowest, size)), (max(highest + 1, 0), size - max(highest + 1, 0))):
            if n > 0:
                taps = torch.arange(start, start + n, device=dw.device)
                unmet = (taps < low[..., None]) | (taps > high[..., None])  # (O, I, n)
                unmet = unmet.reshape(*unmet.shape[:2], *(-1 if m == d else 1 for m in range(2, dw.ndim)))
                dw.narrow(d, start, n).masked_fill_(unmet, 0)


def _ends(x: torch.Tensor, dim: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """The first and last index of a dimension with values that are not zero, (M, C) each, or far apart: 2²⁸, -2²⁸."""
    size, far, ends = x.shape[dim], 2 ** 28, []
    for is_last in (False, True):
        n = 1 if x.device.type == 'cpu' else size  # a few samples tell, mostly
        while True:
            n = min(n, size)
            start = size - n if is_last else 0
            found = x.narrow(dim, start, n) != 0
            for d in range(x.ndim - 1, 1, -1):
                found = found if d == dim else found.any(d)
            index = torch.arange(start, start + n, dtype=torch.int32, device=x.device)
            end = torch.where(found, index, -far).amax(-1) if is_last else torch.where(found, index, far).amin(-1)
            if n == size or bool((end.abs() < far).all()):
                ends.append(end)
                break
            n *= 8
    return ends[0], ends[1]


class _Plan(NamedTuple):
    """Transforms of N samples."""
    lengths: Sequence[int]  # N

    def forward(self, x: torch.Tensor, scale: torch.Tensor, at: Optional[Sequence[int]] = None) -> torch.Tensor:
        """x (M, C, *L), times scale, placed `at` (0 by default) in N samples → spectrum (F, M, C)."""
        padded = x.new_zeros(*x.shape[:2], *self.lengths, dtype=torch.promote_types(x.dtype, torch.float32))
        place = padded
        for d, n in enumerate(x.shape[2:]):
            place = place.narrow(d + 2, at[d] if at else 0, n)
        torch.mul(x, scale, out=place)
        spectrum = torch.fft.rfftn(padded, dim=tuple(range(2, x.ndim)))
        return spectrum.flatten(2).permute(2, 0, 1).contiguous()

    def inverse(
            self,
            spectrum: torch.Tensor,
            out: torch.Tensor,
            scales: Tuple[torch.Tensor, torch.Tensor],
            at: Optional[Sequence[int]] = None,
    ) -> None:
        """spectrum (F, M, C) → out (M, C, *L), the samples from `at` (0 by default) on, divided by both scales."""
        x = spectrum.unflatten(0, (*self.lengths[:-1], self.lengths[-1] // 2 + 1))
        last = len(self.lengths) - 1
        for d, n in enumerate(out.shape[2:]):
            x = torch.fft.irfft(x, self.lengths[d], d) if d == last else torch.fft.ifft(x, dim=d)
            x = x.narrow(d, at[d] if at else 0, n)
        # One scale after the other: their product may be out of range.
        torch.mul(x.movedim((-2, -1), (0, 1)).mul_(1 / scales[0]), 1 / scales[1], out=out)

    def pieces(self, x: torch.Tensor, rows: int, columns: int) -> Iterator[slice]:
        """The rows (or columns) of a matrix for each frequency in pieces; in one on devices without such caches."""
        n = rows
        if x.device.type == 'cpu':
            n = max(1, _PIECE // (columns * math.prod(self.lengths) // 2))
        for start in range(0, rows, n):
            yield slice(start, start + n)


def _plan(size: Sequence[int], kernel_size: Sequence[int], before: Sequence[int]) -> _Plan:
    return _Plan([fast_length(n + max(p, k - 1 - p)) for n, k, p in zip(size, kernel_size, before)])


def _scale(x: torch.Tensor) -> torch.Tensor:
    """The power of two, 1 or less, that brings the largest magnitude of x down to 2³⁰; 1 for NaN and infinity."""
    low, high = x.aminmax()
    largest = torch.maximum(-low, high).to(torch.promote_types(x.dtype, torch.float32))
    exponent = (_EXPONENT - torch.frexp(largest).exponent).clamp(max=0)
    return torch.where(largest.isfinite(), torch.ldexp(torch.ones_like(largest), exponent), 1)
