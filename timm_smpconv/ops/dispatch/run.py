"""One pass of a depthwise convolution: its geometry, its backend, the computation, and the result as it was asked for.

Shapes: B batch, C channels, H and W height and width, KH and KW height and width of the kernel.
"""
import logging
from functools import partial
from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F

from ..backends import BACKENDS, fft
from . import race
from .choose import choose
from .geometry import Geometry, memory_format

__all__ = ['conv', 'gradients', 'weight_gradient']

_logger = logging.getLogger(__name__)


def conv(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        backend: Optional[str],
) -> torch.Tensor:
    """x (B, C, H, W), weight (C, 1, KH, KW), bias (C,) → (B, C, H, W) in the dtype and memory format of x.

    Args:
        x: Of any floating point dtype.
        weight: Of the dtype of x, or as `Backend.rounds_weight` says.
        bias: As the weight.
        backend: The requested one.
    """
    g = Geometry.of('output', x, weight.shape[2], weight.shape[3])
    if g.is_empty():
        return torch.empty_like(x, memory_format=memory_format(x))
    args = _prepared(g, backend, x, g.crop(weight), bias)
    return _finished(g, BACKENDS[_decide(g, backend, args)].conv(*args), g.dtype)


def weight_gradient(
        grad: torch.Tensor,
        x: torch.Tensor,
        kh: int,
        kw: int,
        backend: Optional[str],
        dtype: Optional[torch.dtype] = None,
) -> torch.Tensor:
    """The gradient of the output and x, both (B, C, H, W) → the gradient of the weight, (C, 1, KH, KW), contiguous.

    The result has the given dtype, by default that of x.
    """
    dtype = dtype or x.dtype
    g = Geometry.of('weight gradient', x, kh, kw)
    if g.is_empty():
        return x.new_zeros(x.shape[1], 1, kh, kw, dtype=dtype)
    args = *_prepared(g, backend, grad, x), g.cropped().kh, g.cropped().kw
    return _compute(g, _decide(g, backend, args), args, dtype)


def gradients(
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        backend: Optional[str],
        needs: Tuple[bool, bool] = (True, True),
) -> Tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
    """The gradients of x and of the weight, those that are needed, in the dtypes of grad and of the weight.

    Where one backend computes both, it may do so at once: by FFT they share the transform of grad.
    """
    (kh, kw), (needs_x, needs_weight) = weight.shape[2:], needs
    if not needs_x or x.numel() == 0:
        dx = torch.empty_like(grad, memory_format=memory_format(grad)) if needs_x else None
        return dx, weight_gradient(grad, x, kh, kw, backend, weight.dtype) if needs_weight else None
    to_x, to_weight = Geometry.of('input gradient', grad, kh, kw), Geometry.of('weight gradient', x, kh, kw)
    args = _prepared(to_x, backend, grad, x, to_x.crop(weight))
    if not needs_weight:
        return _compute(to_x, _decide(to_x, backend, args), args, grad.dtype), None
    pair = *args[:2], *args[2].shape[2:]
    for_weight = _decide(to_weight, backend, pair)
    for_x = _decide(to_x, backend, args, is_transformed=for_weight == 'fft')
    both = BACKENDS[for_x].gradients if for_x == for_weight else None
    if both is not None:
        dx, dw = both(*args)
        return _finished(to_x, dx, grad.dtype), _finished(to_weight, dw, weight.dtype)
    return _compute(to_x, for_x, args, grad.dtype), _compute(to_weight, for_weight, pair, weight.dtype)


def _prepared(g: Geometry, backend: Optional[str], *tensors: Any) -> Tuple:
    """In the dtype that is fastest, unless a backend is requested, which computes in the dtype of its input."""
    if backend is not None:
        return tensors
    dtype = g.cropped().dtype
    if dtype == g.dtype:
        return tensors
    return tuple(None if t is None else t.to(dtype) for t in tensors)


def _decide(g: Geometry, backend: Optional[str], args: Tuple, is_transformed: bool = False) -> str:
    """The name of the backend for a pass: the requested one, or the fastest that is accurate and can run.

    Args:
        g: The pass.
        backend: The requested one.
        args: Of `Backend.compute`.
        is_transformed: See `choose`.

    Raises:
        ValueError: The requested backend cannot run.
    """
    x = args[0]
    if backend is not None:
        reason = BACKENDS[backend].unsupported(x)
        if reason is not None:
            raise ValueError(f'backend {backend!r} was requested and cannot run: {reason}')
        return backend
    if race.is_on(x):
        return race.fastest(g, {
            name: partial(_compute, g, name, args, g.dtype)
            for name, candidate in BACKENDS.items() if candidate.unsupported(x) is None})
    name = choose(g, is_transformed=is_transformed)
    if name == 'fft' and not _is_accurate_by_fft(g.what, args):
        name = choose(g, transform=False)
    reason = BACKENDS[name].unsupported(x)
    if reason is None:
        return name
    _logger.debug('backend %s is skipped: %s', name, reason)
    return 'native'


def _is_accurate_by_fft(what: str, args: Tuple) -> bool:
    """Whether a transform is about as accurate as a direct convolution for these values."""
    if what == 'weight gradient':
        return fft.is_in_range(args[0], args[1])
    return fft.is_accurate(args[0], args[1] if what == 'output' else args[2])


def _compute(g: Geometry, name: str, args: Tuple, dtype: torch.dtype) -> torch.Tensor:
    """The pass by one backend."""
    return _finished(g, BACKENDS[name].compute(g.what, args), dtype)


def _finished(g: Geometry, y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The result in its dtype: in the memory format of the pass, a weight's gradient of full size and contiguous."""
    if y.dtype != dtype:
        y = y.to(dtype)
    if g.what != 'weight gradient':
        return y.contiguous(memory_format=torch.channels_last if g.channels_last else torch.contiguous_format)
    dy, dx = g.margins
    return (F.pad(y, (dx, dx, dy, dy)) if dy or dx else y).contiguous()
