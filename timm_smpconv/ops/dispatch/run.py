"""One pass of a depthwise convolution: crop the kernel, `choose` a backend, compute, finish as it was asked for.

Shapes: B batch, C channels, H and W height and width, KH and KW height and width of the kernel.
"""
from typing import Any, Optional, Tuple

import torch

from ..backends import BACKENDS
from .choose import choose
from .geometry import Geometry, memory_format

__all__ = ['conv', 'gradients', 'weight_gradient']


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
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=memory_format(x))
    args = _prepared(g, backend, x, g.crop(weight), bias)
    return g.finish(BACKENDS[choose(g, backend, args)].conv(*args), g.dtype)


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
    if x.numel() == 0:
        return x.new_zeros(x.shape[1], 1, kh, kw, dtype=dtype)
    args = *_prepared(g, backend, grad, x), g.cropped().kh, g.cropped().kw
    return _compute(g, choose(g, backend, args), args, dtype)


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
        return _compute(to_x, choose(to_x, backend, args), args, grad.dtype), None
    pair = *args[:2], *args[2].shape[2:]
    for_weight = choose(to_weight, backend, pair)
    for_x = choose(to_x, backend, args, is_transformed=for_weight == 'fft')
    both = BACKENDS[for_x].gradients if for_x == for_weight else None
    if both is not None:
        dx, dw = both(*args)
        return to_x.finish(dx, grad.dtype), to_weight.finish(dw, weight.dtype)
    return _compute(to_x, for_x, args, grad.dtype), _compute(to_weight, for_weight, pair, weight.dtype)


def _prepared(g: Geometry, backend: Optional[str], *tensors: Any) -> Tuple:
    """In the dtype that is fastest, unless a backend is requested, which computes in the dtype of its input."""
    if backend is not None:
        return tensors
    dtype = g.cropped().dtype
    if dtype == g.dtype:
        return tensors
    return tuple(None if t is None else t.to(dtype) for t in tensors)


def _compute(g: Geometry, name: str, args: Tuple, dtype: torch.dtype) -> torch.Tensor:
    """The pass by one backend."""
    return g.finish(BACKENDS[name].compute(g.what, args), dtype)
