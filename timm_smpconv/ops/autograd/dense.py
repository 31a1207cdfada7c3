"""The convolution over channels by FFT and its weight gradient: two operators that are closed under differentiation.

Shapes: B batch, I and O channels in and out, L size of the input in each of its one or two dimensions, K size of the
kernel; p, `before`: zeros in front of the input. The formulas are in `spectra`.

    y  = conv(x, w)                derivatives: conv(g, w, transposed), weight_gradient(g, x)
    y  = conv(x, w, transposed)                 conv(g, w),             weight_gradient(x, g)
    dw = weight_gradient(g, x)                  conv(x, v),             conv(g, v, transposed)

The plain functions, the registered operators and the autograd functions have the same uses as in `depthwise`.
"""
import math
from typing import List, Optional, Sequence

import torch

from .. import _private
from ..backends import spectra
from .depthwise import batch_first, is_observed


def conv(
        x: torch.Tensor,
        weight: torch.Tensor,
        before: Sequence[int],
        groups: int,
        transposed: bool,
) -> torch.Tensor:
    """x (B, I, *L), weight (O, I / groups, *K) → (B, O, *L); transposed x (B, O, *L) → (B, I, *L)."""
    if transposed:
        return spectra.gradients(x, None, weight, weight.shape[2:], before, groups)[0]
    return spectra.conv(x, weight, before, groups)


def weight_gradient(
        grad: torch.Tensor,
        x: torch.Tensor,
        kernel_size: Sequence[int],
        before: Sequence[int],
        groups: int,
) -> torch.Tensor:
    """The gradient of the output, (B, O, *L), and x, (B, I, *L) → the gradient of the weight, (O, I / groups, *K)."""
    return spectra.gradients(grad, x, None, kernel_size, before, groups)[1]


@torch.library.custom_op('timm_smpconv::fft_conv', mutates_args=())
def conv_op(
        x: torch.Tensor,
        weight: torch.Tensor,
        before: List[int],
        groups: int,
        transposed: bool,
) -> torch.Tensor:
    return conv(x, weight, before, groups, transposed)


@torch.library.custom_op('timm_smpconv::fft_corr', mutates_args=())
def weight_gradient_op(
        grad: torch.Tensor,
        x: torch.Tensor,
        kernel_size: List[int],
        before: List[int],
        groups: int,
) -> torch.Tensor:
    return weight_gradient(grad, x, kernel_size, before, groups)


@conv_op.register_fake
def _(x, weight, before, groups, transposed):
    return spectra.empty(x, weight.shape[1] * groups if transposed else weight.shape[0])


@weight_gradient_op.register_fake
def _(grad, x, kernel_size, before, groups):
    return x.new_empty(grad.shape[1], x.shape[1] // groups, *kernel_size)


def _conv_context(ctx, inputs, output) -> None:
    x, weight, ctx.before, ctx.groups, ctx.transposed = inputs
    ctx.save_for_backward(x, weight)
    ctx.save_for_forward(x, weight)


def _conv_backward(ctx, grad):
    x, weight = ctx.saved_tensors
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    kernel_size, geometry = weight.shape[2:], (ctx.before, ctx.groups)
    if not is_observed(grad) and not ctx.transposed:  # both share a transform
        gradients = spectra.gradients(
            grad, x if needs_weight else None, weight if needs_x else None, kernel_size, *geometry)
        return (*gradients, None, None, None)
    dx = Conv.apply(grad, weight, *geometry, not ctx.transposed) if needs_x else None
    pair = (x, grad) if ctx.transposed else (grad, x)
    dw = WeightGradient.apply(*pair, kernel_size, *geometry) if needs_weight else None
    return dx, dw, None, None, None


def _gradient_context(ctx, inputs, output) -> None:
    grad, x, ctx.kernel_size, ctx.before, ctx.groups = inputs
    ctx.save_for_backward(grad, x)
    ctx.save_for_forward(grad, x)


def _gradient_backward(ctx, v):
    grad, x = ctx.saved_tensors
    needs_grad, needs_x = ctx.needs_input_grad[:2]
    return (
        Conv.apply(x, v, ctx.before, ctx.groups, False) if needs_grad else None,
        Conv.apply(grad, v, ctx.before, ctx.groups, True) if needs_x else None,
        None, None, None,
    )


def _into_channels(t: torch.Tensor, dim: Optional[int], n: int) -> torch.Tensor:
    """(B, C, *L) with a mapped dimension of size n → (B, n * C, *L)."""
    return batch_first(t, dim, n).movedim(0, 1).flatten(1, 2)


class Conv(torch.autograd.Function):
    """The convolution with all its derivatives and a batching rule."""

    @staticmethod
    def forward(x, weight, before, groups, transposed):
        convolve = torch.ops.timm_smpconv.fft_conv if is_observed(x, weight) else conv
        return convolve(x, weight, before, groups, transposed)

    setup_context = staticmethod(_conv_context)
    backward = staticmethod(_conv_backward)

    @staticmethod
    def jvp(ctx, dx, dweight, *_):
        x, weight = ctx.saved_tensors
        rest = ctx.before, ctx.groups, ctx.transposed
        terms = [] if dx is None else [Conv.apply(dx, weight, *rest)]
        terms += [] if dweight is None else [Conv.apply(x, dweight, *rest)]
        return sum(terms)

    @staticmethod
    def vmap(info, in_dims, x, weight, before, groups, transposed):
        n = info.batch_size
        if in_dims[1] is None:
            y = Conv.apply(x.movedim(in_dims[0], 0).flatten(0, 1), weight, before, groups, transposed)
            return y.unflatten(0, (n, -1)), 0
        weight = batch_first(weight, in_dims[1], n).flatten(0, 1)
        y = Conv.apply(_into_channels(x, in_dims[0], n), weight, before, n * groups, transposed)
        return y.unflatten(1, (n, -1)), 1


class WeightGradient(torch.autograd.Function):
    """The weight gradient with all its derivatives and a batching rule."""

    @staticmethod
    def forward(grad, x, kernel_size, before, groups):
        correlate = torch.ops.timm_smpconv.fft_corr if is_observed(grad, x) else weight_gradient
        return correlate(grad, x, kernel_size, before, groups)

    setup_context = staticmethod(_gradient_context)
    backward = staticmethod(_gradient_backward)

    @staticmethod
    def jvp(ctx, dgrad, dx, *_):
        grad, x = ctx.saved_tensors
        rest = ctx.kernel_size, ctx.before, ctx.groups
        terms = [] if dgrad is None else [WeightGradient.apply(dgrad, x, *rest)]
        terms += [] if dx is None else [WeightGradient.apply(grad, dx, *rest)]
        return sum(terms)

    @staticmethod
    def vmap(info, in_dims, grad, x, kernel_size, before, groups):
        n = info.batch_size
        grad, x = _into_channels(grad, in_dims[0], n), _into_channels(x, in_dims[1], n)
        dw = WeightGradient.apply(grad, x, kernel_size, before, n * groups)  # (n * O, I / groups, *K)
        return dw.unflatten(0, (n, -1)), 0


conv_op.register_autograd(_conv_backward, setup_context=_conv_context)
weight_gradient_op.register_autograd(_gradient_backward, setup_context=_gradient_context)


@_private.flop_formula(torch.ops.timm_smpconv.fft_conv)
def _conv_flops(x_shape, weight_shape, *_, **__) -> int:
    """Of the direct convolution, as PyTorch counts `F.conv1d` and `F.conv2d`; of a transposed one as well."""
    return 2 * x_shape[0] * math.prod(x_shape[2:]) * math.prod(weight_shape)


@_private.flop_formula(torch.ops.timm_smpconv.fft_corr)
def _gradient_flops(grad_shape, x_shape, kernel_size, before, groups, *_, **__) -> int:
    """Of the direct weight gradient."""
    return 2 * math.prod(grad_shape) * (x_shape[1] // groups) * math.prod(kernel_size)
