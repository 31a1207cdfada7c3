"""The depthwise convolution and its weight gradient: two operators that are closed under differentiation.

Shapes: B batch, C channels, H and W height and width, K and L height and width of the kernel, both odd.

    y  = conv(x, w)          y[b,c,i,j]  = Σ_kl  w[c,k,l] x[b,c,i+k-K//2,j+l-L//2]
    dx = conv(g, flip(w))
    dw = corr(g, x)          dw[c,k,l]   = Σ_bij g[b,c,i,j] x[b,c,i+k-K//2,j+l-L//2]

Every derivative of every order is one of the two again. They exist in three forms:

- `conv` and `corr` are plain functions. They run where nothing has to see them: without gradients, and in a backward
  pass that is not differentiated itself.
- The registered operators `timm_smpconv::depthwise_conv2d` and `depthwise_corr2d` are for compilers, which neither look
  inside nor differentiate them: `torch.compile` of a training step, FakeTensor, opcheck.
- The autograd functions `Conv` and `Corr` are for everything else that differentiates or transforms: eager training,
  double backward, forward mode, `torch.func`. torch.library's own derivatives do not reach `torch.func`.
"""
import math
from typing import Optional, Tuple

import torch
import torch.nn.functional as F

from . import private
from .backends import fft
from .choice import compute, margins, memory_format, races, select, working_dtype


def conv(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        backend: Optional[str],
) -> torch.Tensor:
    """x (B, C, H, W), weight (C, 1, K, L), bias (C,) → (B, C, H, W) in the dtype and memory format of x."""
    layout, dtype = memory_format(x), x.dtype
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=layout)
    weight = _cropped(weight, x)
    if backend is None:
        working = working_dtype(x, weight.shape[3])
        x, weight, bias = x.to(working), weight.to(working), None if bias is None else bias.to(working)
    return compute(
        'output', x, weight.shape[2:], backend,
        lambda b: b.conv(x, weight, bias).to(dtype).contiguous(memory_format=layout),
        lambda: fft.is_accurate(x, weight))


def corr(
        grad: torch.Tensor,
        x: torch.Tensor,
        k: int,
        l: int,
        backend: Optional[str],
        dtype: Optional[torch.dtype] = None,
) -> torch.Tensor:
    """The gradient of the output and x, both (B, C, H, W) → the gradient of the weight, (C, 1, K, L), contiguous.

    The result has the given dtype, by default that of x.
    """
    dtype = dtype or x.dtype
    if x.numel() == 0:
        return x.new_zeros(x.shape[1], 1, k, l, dtype=dtype)
    dy, dx = margins(x, k, l)
    size = k - 2 * dy, l - 2 * dx
    if backend is None:
        working = working_dtype(x, size[1])
        grad, x = grad.to(working), x.to(working)
    return compute(
        'weight gradient', x, size, backend,
        lambda b: F.pad(b.corr(grad, x, *size), (dx, dx, dy, dy)).to(dtype).contiguous(),
        lambda: fft.is_in_range(grad, x), grad)


def input_gradient(
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        backend: Optional[str],
) -> torch.Tensor:
    """The gradient of the output (B, C, H, W) → the gradient of x, in the dtype and memory format of the former."""
    layout, dtype = memory_format(grad), grad.dtype
    if grad.numel() == 0:
        return torch.empty_like(grad, memory_format=layout)
    weight = _cropped(weight, x)
    if backend is None:
        working = working_dtype(x, weight.shape[3])
        grad, x, weight = grad.to(working), x.to(working), weight.to(working)
    return compute(
        'input gradient', grad, weight.shape[2:], backend,
        lambda b: b.input_gradient(grad, x, weight).to(dtype).contiguous(memory_format=layout),
        lambda: fft.is_accurate(grad, weight))


def gradients(
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        backend: Optional[str],
) -> Tuple[torch.Tensor, torch.Tensor]:
    """`input_gradient` and `corr`. Where both are computed by FFT, they share the transform of grad."""
    k, l = weight.shape[2:]
    dy, dx = margins(x, k, l)
    cropped = _cropped(weight, x)
    size = cropped.shape[2:]
    if x.numel() and not races(x, backend):
        working = x.dtype if backend else working_dtype(x, size[1])
        g, i = grad.to(working), x.to(working)
        by_fft = select(
            'input gradient', g, size, backend, lambda: fft.is_accurate(g, cropped), is_transformed=True) == 'fft'
        if by_fft and select('weight gradient', i, size, backend, lambda: fft.is_in_range(g, i)) == 'fft':
            to_x, to_weight = fft.gradients(g, i, cropped.to(working))
            return (
                to_x.to(grad.dtype).contiguous(memory_format=memory_format(grad)),
                F.pad(to_weight, (dx, dx, dy, dy)).to(weight.dtype).contiguous())
    return input_gradient(grad, x, weight, backend), corr(grad, x, k, l, backend, weight.dtype)


def _cropped(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The part of a kernel that meets more than padding."""
    dy, dx = margins(x, weight.shape[2], weight.shape[3])
    return weight[:, :, dy:weight.shape[2] - dy, dx:weight.shape[3] - dx] if dy or dx else weight


@torch.library.custom_op('timm_smpconv::depthwise_conv2d', mutates_args=())
def conv_op(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        backend: Optional[str],
) -> torch.Tensor:
    return conv(x, weight, bias, backend)


@torch.library.custom_op('timm_smpconv::depthwise_corr2d', mutates_args=())
def corr_op(
        grad: torch.Tensor,
        x: torch.Tensor,
        k: int,
        l: int,
        backend: Optional[str],
        dtype: Optional[torch.dtype] = None,
) -> torch.Tensor:
    return corr(grad, x, k, l, backend, dtype)


@conv_op.register_fake
def _(x, weight, bias, backend):
    return torch.empty_like(x, memory_format=memory_format(x))


@corr_op.register_fake
def _(grad, x, k, l, backend, dtype=None):
    return x.new_empty(x.shape[1], 1, k, l, dtype=dtype or x.dtype)


def is_observed(grad: torch.Tensor) -> bool:
    """Whether a graph, a mode, a subclass, a transform or a batched pass has to see what is computed from grad."""
    if torch.is_grad_enabled() or type(grad) is not torch.Tensor or private.dispatch_mode_active():
        return True
    return private.transforms_active() or private.is_batched(grad)


def _conv_context(ctx, inputs, output) -> None:
    x, weight, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight)
    ctx.save_for_forward(x, weight)


def _conv_backward(ctx, grad):
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
    k, l = weight.shape[2:]
    dx: Optional[torch.Tensor] = None
    dw: Optional[torch.Tensor] = None
    if is_observed(grad):
        dx = Conv.apply(grad, weight.flip(2, 3), None, ctx.backend) if needs_x else None
        dw = Corr.apply(grad, x, k, l, ctx.backend, weight.dtype) if needs_weight else None
    elif needs_x and needs_weight:
        dx, dw = gradients(grad, x, weight, ctx.backend)
    elif needs_x:
        dx = input_gradient(grad, x, weight, ctx.backend)
    elif needs_weight:
        dw = corr(grad, x, k, l, ctx.backend, weight.dtype)
    return dx, dw, grad.sum((0, 2, 3)) if needs_bias else None, None


def _corr_context(ctx, inputs, output) -> None:
    grad, x, ctx.k, ctx.l, ctx.backend, ctx.dtype = inputs
    ctx.save_for_backward(grad, x)
    ctx.save_for_forward(grad, x)


def _corr_backward(ctx, v):
    grad, x = ctx.saved_tensors
    needs_grad, needs_x = ctx.needs_input_grad[:2]
    convolve = Conv.apply if is_observed(v) else conv
    return (
        convolve(x, v, None, ctx.backend) if needs_grad else None,
        convolve(grad, v.flip(2, 3), None, ctx.backend) if needs_x else None,
        None, None, None, None,
    )


def batch_first(t: torch.Tensor, dim: Optional[int], size: int) -> torch.Tensor:
    """The mapped dimension in front, of its full size."""
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def _into_channels(t: torch.Tensor) -> torch.Tensor:
    """(N, B, C, H, W) → (B, N * C, H, W)."""
    return t.movedim(0, 1).flatten(1, 2)


class Conv(torch.autograd.Function):
    """`conv` with all its derivatives and a batching rule."""

    @staticmethod
    def forward(x, weight, bias, backend):
        return torch.ops.timm_smpconv.depthwise_conv2d(x, weight, bias, backend)

    setup_context = staticmethod(_conv_context)
    backward = staticmethod(_conv_backward)

    @staticmethod
    def jvp(ctx, dx, dweight, dbias, _):
        x, weight = ctx.saved_tensors
        terms = [] if dx is None else [Conv.apply(dx, weight, None, ctx.backend)]
        terms += [] if dweight is None else [Conv.apply(x, dweight, None, ctx.backend)]
        terms += [] if dbias is None else [dbias[:, None, None].expand_as(x)]
        return sum(terms)

    @staticmethod
    def vmap(info, in_dims, x, weight, bias, backend):
        n = info.batch_size
        if in_dims[1] is None and in_dims[2] is None:
            y = Conv.apply(x.movedim(in_dims[0], 0).flatten(0, 1), weight, bias, backend)
            return y.unflatten(0, (n, -1)), 0
        x, weight = batch_first(x, in_dims[0], n), batch_first(weight, in_dims[1], n)
        bias = None if bias is None else batch_first(bias, in_dims[2], n).flatten()
        y = Conv.apply(_into_channels(x), weight.flatten(0, 1), bias, backend)  # (B, N * C, H, W)
        return y.unflatten(1, (n, -1)), 1


class Corr(torch.autograd.Function):
    """`corr` with all its derivatives and a batching rule."""

    @staticmethod
    def forward(grad, x, k, l, backend, dtype):
        return torch.ops.timm_smpconv.depthwise_corr2d(grad, x, k, l, backend, dtype)

    setup_context = staticmethod(_corr_context)
    backward = staticmethod(_corr_backward)

    @staticmethod
    def jvp(ctx, dgrad, dx, *_):
        grad, x = ctx.saved_tensors
        terms = [] if dgrad is None else [Corr.apply(dgrad, x, ctx.k, ctx.l, ctx.backend, ctx.dtype)]
        terms += [] if dx is None else [Corr.apply(grad, dx, ctx.k, ctx.l, ctx.backend, ctx.dtype)]
        return sum(terms)

    @staticmethod
    def vmap(info, in_dims, grad, x, k, l, backend, dtype):
        n = info.batch_size
        grad, x = batch_first(grad, in_dims[0], n), batch_first(x, in_dims[1], n)
        dw = Corr.apply(_into_channels(grad), _into_channels(x), k, l, backend, dtype)  # (N * C, 1, K, L)
        return dw.unflatten(0, (n, -1)), 0


conv_op.register_autograd(_conv_backward, setup_context=_conv_context)
corr_op.register_autograd(_corr_backward, setup_context=_corr_context)


@private.flop_formula(torch.ops.timm_smpconv.depthwise_conv2d)
def _conv_flops(x_shape, weight_shape, *_, **__) -> int:
    """Of the direct convolution, as PyTorch counts `F.conv2d`, whatever computes it."""
    return 2 * math.prod(x_shape) * weight_shape[2] * weight_shape[3]


@private.flop_formula(torch.ops.timm_smpconv.depthwise_corr2d)
def _corr_flops(grad_shape, x_shape, k, l, *_, **__) -> int:
    """Of the direct weight gradient."""
    return 2 * math.prod(x_shape) * k * l
