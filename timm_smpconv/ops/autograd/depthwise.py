"""The depthwise convolution and its weight gradient: two operators that are closed under differentiation.

Shapes: B batch, C channels, H and W height and width, KH and KW height and width of the kernel, both odd.

    y  = conv(x, w)               y[b,c,i,j]  = Σ_kl  w[c,k,l] x[b,c,i+k-KH//2,j+l-KW//2]
    dx = conv(g, flip(w))
    dw = weight_gradient(g, x)    dw[c,k,l]   = Σ_bij g[b,c,i,j] x[b,c,i+k-KH//2,j+l-KW//2]

Every derivative of every order is one of the two again. They exist in three forms:

- `conv` and `weight_gradient` of `dispatch.run` are plain functions. They run where nothing has to see them: without
  gradients, in the forward pass of eager training, and in a backward pass that is not differentiated itself.
- The registered operators `timm_smpconv::depthwise_conv2d` and `depthwise_corr2d` are for compilers, which neither look
  inside nor differentiate them: `torch.compile` of a training step, FakeTensor, opcheck.
- The autograd functions `Conv` and `WeightGradient` are for everything else that differentiates or transforms: eager
  training, double backward, forward mode, `torch.func`. torch.library's own derivatives do not reach `torch.func`.
"""
import math
from typing import Optional

import torch

from .. import _private
from ..dispatch import run
from ..dispatch.geometry import memory_format


@torch.library.custom_op('timm_smpconv::depthwise_conv2d', mutates_args=())
def conv_op(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        backend: Optional[str],
) -> torch.Tensor:
    return run.conv(x, weight, bias, backend)


@torch.library.custom_op('timm_smpconv::depthwise_corr2d', mutates_args=())
def weight_gradient_op(
        grad: torch.Tensor,
        x: torch.Tensor,
        kh: int,
        kw: int,
        backend: Optional[str],
        dtype: Optional[torch.dtype] = None,
) -> torch.Tensor:
    return run.weight_gradient(grad, x, kh, kw, backend, dtype)


@conv_op.register_fake
def _(x, weight, bias, backend):
    return torch.empty_like(x, memory_format=memory_format(x))


@weight_gradient_op.register_fake
def _(grad, x, kh, kw, backend, dtype=None):
    return x.new_empty(x.shape[1], 1, kh, kw, dtype=dtype or x.dtype)


def is_observed(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether a graph, a mode, a subclass, a transform or a batched pass has to see what is computed from tensors."""
    if torch.is_grad_enabled() or type(x) is not torch.Tensor or _private.dispatch_mode_active():
        return True
    return _private.transforms_active() or any(map(_private.is_batched, (x, *others)))


def _conv_context(ctx, inputs, output) -> None:
    x, weight, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight)
    ctx.save_for_forward(x, weight)


def _conv_backward(ctx, grad):
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
    dx: Optional[torch.Tensor] = None
    dw: Optional[torch.Tensor] = None
    if not is_observed(grad):
        dx, dw = run.gradients(grad, x, weight, ctx.backend, (needs_x, needs_weight))
    else:
        if needs_x:
            dx = Conv.apply(grad, weight.flip(2, 3), None, ctx.backend)
        if needs_weight:
            dw = WeightGradient.apply(grad, x, weight.shape[2], weight.shape[3], ctx.backend, weight.dtype)
    return dx, dw, grad.sum((0, 2, 3)) if needs_bias else None, None


def _gradient_context(ctx, inputs, output) -> None:
    grad, x, ctx.kh, ctx.kw, ctx.backend, ctx.dtype = inputs
    ctx.save_for_backward(grad, x)
    ctx.save_for_forward(grad, x)


def _gradient_backward(ctx, v):
    grad, x = ctx.saved_tensors
    needs_grad, needs_x = ctx.needs_input_grad[:2]
    convolve = Conv.apply if is_observed(v) else run.conv
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
    """The convolution with all its derivatives and a batching rule."""

    @staticmethod
    def forward(x, weight, bias, backend):
        convolve = torch.ops.timm_smpconv.depthwise_conv2d if is_observed(x, weight) else run.conv
        return convolve(x, weight, bias, backend)

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


class _RecordedConv(torch.autograd.Function):
    """`Conv` where no transform is active. Without a separate `setup_context`, a call takes 35 µs less (torch 2.14)."""

    @staticmethod
    def forward(ctx, x, weight, bias, backend):
        _conv_context(ctx, (x, weight, bias, backend), None)
        return Conv.forward(x, weight, bias, backend)

    backward = staticmethod(_conv_backward)
    jvp = Conv.jvp


def convolve(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        backend: Optional[str],
) -> torch.Tensor:
    """`run.conv` where it is recorded or transformed."""
    function = Conv if _private.transforms_active() else _RecordedConv
    return function.apply(x, weight, bias, backend)


class WeightGradient(torch.autograd.Function):
    """The weight gradient with all its derivatives and a batching rule."""

    @staticmethod
    def forward(grad, x, kh, kw, backend, dtype):
        correlate = torch.ops.timm_smpconv.depthwise_corr2d if is_observed(grad, x) else run.weight_gradient
        return correlate(grad, x, kh, kw, backend, dtype)

    setup_context = staticmethod(_gradient_context)
    backward = staticmethod(_gradient_backward)

    @staticmethod
    def jvp(ctx, dgrad, dx, *_):
        grad, x = ctx.saved_tensors
        terms = [] if dgrad is None else [WeightGradient.apply(dgrad, x, ctx.kh, ctx.kw, ctx.backend, ctx.dtype)]
        terms += [] if dx is None else [WeightGradient.apply(grad, dx, ctx.kh, ctx.kw, ctx.backend, ctx.dtype)]
        return sum(terms)

    @staticmethod
    def vmap(info, in_dims, grad, x, kh, kw, backend, dtype):
        n = info.batch_size
        grad, x = batch_first(grad, in_dims[0], n), batch_first(x, in_dims[1], n)
        dw = WeightGradient.apply(_into_channels(grad), _into_channels(x), kh, kw, backend, dtype)  # (N * C, 1, KH, KW)
        return dw.unflatten(0, (n, -1)), 0


conv_op.register_autograd(_conv_backward, setup_context=_conv_context)
weight_gradient_op.register_autograd(_gradient_backward, setup_context=_gradient_context)


@_private.flop_formula(torch.ops.timm_smpconv.depthwise_conv2d)
def _conv_flops(x_shape, weight_shape, *_, **__) -> int:
    """Of the direct convolution, as PyTorch counts `F.conv2d`, whatever computes it."""
    return 2 * math.prod(x_shape) * weight_shape[2] * weight_shape[3]


@_private.flop_formula(torch.ops.timm_smpconv.depthwise_corr2d)
def _gradient_flops(grad_shape, x_shape, kh, kw, *_, **__) -> int:
    """Of the direct weight gradient."""
    return 2 * math.prod(x_shape) * kh * kw
