"""A convolution with its activation and a residual in one pass of oneDNN: what merged models consist of.

`torch.compile` does the same with frozen weights, after half a minute and with a C++ compiler. This needs neither.

There are several plans to compute one, see `PLANS`. 1×1 convolutions are matrix products: all those of `smpconv_tiny`,
channels_last, batch 1, take 54 ms as oneDNN's convolutions and 46 as its matrix products, and 43 with kept copies of
the weights in a format of its own, which it otherwise makes before every product (2 cores, AVX-512, torch 2.14).

Shapes: B batch, C and O channels in and out, H and W height and width, KH and KW height and width of the kernel.
"""
from functools import partial
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.fx
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function

from . import _private
from .backends import fft
from .depthwise import depthwise_conv2d
from .dispatch import cpu
from .dispatch.choose import expected_fastest
from .dispatch.geometry import Geometry, memory_format
from .dispatch.kept import Kept
from .dispatch.request import check_exportable, requested_backend

__all__ = ['ACTIVATIONS', 'PLANS', 'conv2d_in_steps', 'fused_conv2d', 'measure_fused']

ACTIVATIONS = ('none', 'relu', 'gelu')
# oneDNN's matrix product and its convolution, with the activation; otherwise step by step: `F.conv2d`, or a large
# depthwise convolution by one of its backends.
PLANS = ('matrix product', 'one pass', 'native', 'contiguous', 'channels_last', 'fft')

_convolve: Any = _private.pointwise_convolution()
_multiply: Any = _private.pointwise_linear()


class _Arguments(NamedTuple):
    """Those of `F.conv2d` that are no tensors."""
    stride: Tuple[int, int]
    padding: Tuple[int, int]
    dilation: Tuple[int, int]
    groups: int


class _Call(NamedTuple):
    """What `fused_conv2d` is called with."""
    x: torch.Tensor
    weight: torch.Tensor
    bias: Optional[torch.Tensor]
    arguments: _Arguments
    activation: str
    residual: Optional[torch.Tensor]

    @property
    def tensors(self) -> List[torch.Tensor]:
        return [t for t in (self.x, self.weight, self.bias, self.residual) if t is not None]

    @property
    def kind(self) -> Tuple:
        """What the fastest plan depends on."""
        x, residual = self.x, self.residual
        added = None if residual is None else (residual.shape, memory_format(residual))
        return x.shape, x.dtype, memory_format(x), added, torch.get_num_threads()

    def is_same_depthwise(self) -> bool:
        """Whether `depthwise_conv2d` computes the convolution."""
        return self.weight.ndim == 4 and self.x.shape[1] == self.weight.shape[0] and _is_same_depthwise(
            self.weight, *self.arguments)

    def geometry(self) -> Geometry:
        """Of the depthwise convolution."""
        return Geometry.of('output', self.x, self.weight.shape[2], self.weight.shape[3])


def fused_conv2d(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor] = None,
        stride: Tuple[int, int] = (1, 1),
        padding: Tuple[int, int] = (0, 0),
        dilation: Tuple[int, int] = (1, 1),
        groups: int = 1,
        activation: str = 'none',
        residual: Optional[torch.Tensor] = None,
        kept: Optional[Kept] = None,
) -> torch.Tensor:
    """`activation(F.conv2d(x, weight, bias, stride, padding, dilation, groups)) + residual`.

    Computed in one pass on CPUs with AVX2 or AVX-512, in float32 and bfloat16, for channels_last inputs, where nothing
    is recorded, compiled or exported. Otherwise step by step.

    Args:
        x: (B, C, H, W).
        weight: (O, C / groups, KH, KW).
        bias: (O,).
        stride: Of `F.conv2d`, a pair.
        padding: Of `F.conv2d`, a pair.
        dilation: Of `F.conv2d`, a pair.
        groups: Of `F.conv2d`.
        activation: One of `ACTIVATIONS`; 'gelu' is the exact one, with the error function.
        residual: (B, O, H', W'), the shape of the result. It is not changed.
        kept: Holds what is derived from the weight from one call to the next, if it does not require gradients.

    Returns:
        (B, O, H', W'). GELU in one pass turns infinity into NaN; everything else is the same in both ways.

    Example:
        >>> x, weight = torch.randn(1, 8, 14, 14), torch.randn(16, 8, 1, 1)
        >>> fused_conv2d(x, weight, activation='relu').shape
        torch.Size([1, 16, 14, 14])
    """
    inputs = [t for t in (x, weight, bias, residual) if t is not None]
    if has_torch_function(inputs):
        if any(isinstance(t, torch.fx.Proxy) for t in inputs):  # TorchScript may have to compile this graph
            return handle_torch_function(
                conv2d_in_steps, inputs, x, weight, bias, stride, padding, dilation, groups, activation, residual)
        return handle_torch_function(
            fused_conv2d, inputs, x, weight, bias, stride, padding, dilation, groups, activation, residual, kept)
    if torch.jit.is_tracing() and groups > 1:
        check_exportable(requested_backend())
    call = _Call(x, weight, bias, _Arguments(stride, padding, dilation, groups), activation, residual)
    if not _is_free(call):
        return conv2d_in_steps(x, weight, bias, stride, padding, dilation, groups, activation, residual)
    plan = None if kept is None else kept.fastest(call.kind)
    return _compute(plan or _expected_fastest(call, kept), call, kept)


def measure_fused(
        kept: Kept,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        stride: Tuple[int, int],
        padding: Tuple[int, int],
        dilation: Tuple[int, int],
        groups: int,
        activation: str,
        residual: Optional[torch.Tensor] = None,
) -> Dict[str, float]:
    """Time all plans to compute `fused_conv2d` for such an input, and let `kept` hold the fastest.

    Returns:
        Milliseconds of each plan. A plan that fails or differs from `F.conv2d` is left out. Nothing is measured, and
        the result empty, where the images make NaN or infinity, or where not the result alone counts.
    """
    call = _Call(x, weight, bias, _Arguments(stride, padding, dilation, groups), activation, residual)
    if not _is_free(call):
        return {}
    # In float32 at least: there are convolutions in bfloat16 that never return.
    dtype = torch.promote_types(x.dtype, torch.float32)
    expected = conv2d_in_steps(
        x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), *call.arguments, activation,
        None if residual is None else residual.to(dtype), 'native')
    # What each derives from the weight is kept apart, so that it derives it once.
    candidates = {plan: partial(_compute, plan, call, Kept()) for plan in _plans(call)}
    return kept.measure(call.kind, candidates, expected, x.dtype, f'x {tuple(x.shape)}')


def conv2d_in_steps(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        stride: Tuple[int, int],
        padding: Tuple[int, int],
        dilation: Tuple[int, int],
        groups: int,
        activation: str,
        residual: Optional[torch.Tensor],
        backend: Optional[str] = None,
) -> torch.Tensor:
    """`fused_conv2d` by standard operators and `depthwise_conv2d`, for TorchScript too."""
    if not torch.jit.is_tracing() and _is_same_depthwise(weight, stride, padding, dilation, groups):
        y = depthwise_conv2d(x, weight, bias, backend)
    else:
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if activation == 'relu':
        y = F.relu(y, inplace=True)
    elif activation == 'gelu':
        y = _gelu(y)
    return y if residual is None else residual + y


def _is_same_depthwise(
        weight: torch.Tensor,
        stride: Tuple[int, int],
        padding: Tuple[int, int],
        dilation: Tuple[int, int],
        groups: int,
) -> bool:
    """Whether this is a depthwise convolution of odd kernels that keeps the size."""
    channels, inputs, kh, kw = weight.shape
    if groups != channels or inputs != 1 or kh % 2 == 0 or kw % 2 == 0:
        return False
    ones = stride[0] == 1 and stride[1] == 1 and dilation[0] == 1 and dilation[1] == 1
    return ones and padding[0] == kh // 2 and padding[1] == kw // 2


def _is_free(call: _Call) -> bool:
    """Whether nothing but the result counts: nothing is recorded, compiled, transformed, watched or requested.

    Invalid dtypes are not free: they fall through to the standard operators, which raise.
    """
    x, tensors = call.x, call.tensors
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled('cpu'):
        return False
    if x.device.type != 'cpu' or x.ndim != 4 or x.numel() == 0 or not torch.backends.mkldnn.enabled:
        return False
    if _private.transforms_active() or _private.forward_ad_active() or _private.dispatch_mode_active():
        return False
    if requested_backend() is not None:
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    if any(type(t) not in (torch.Tensor, torch.nn.Parameter) for t in tensors):
        return False
    return all(t.dtype == x.dtype and t.device == x.device for t in tensors)


def _fits_one_pass(call: _Call) -> bool:
    """Whether one pass is available and equivalent. Invalid shapes do not fit."""
    x, weight, residual = call.x, call.weight, call.residual
    stride, padding, dilation, groups = call.arguments
    if _convolve is None or not cpu.HERE.fuses(x.dtype):
        return False
    if weight.ndim != 4 or x.shape[1] != weight.shape[1] * groups or min(stride) < 1:
        return False
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(x.shape[2:], padding, dilation, weight.shape[2:], stride)]
    if min(size) < 1 or memory_format(x) != torch.channels_last:
        return False
    if residual is not None:
        if residual.shape != (x.shape[0], weight.shape[0], *size):
            return False
        if memory_format(residual) != torch.channels_last:
            return False
    return not call.is_same_depthwise() or call.geometry().cropped().dtype == x.dtype


def _is_product(call: _Call) -> bool:
    """Whether the convolution is a matrix product over channels."""
    return (
        _multiply is not None and call.arguments.groups == 1 and call.weight.shape[2:] == (1, 1)
        and call.arguments.stride == (1, 1) and call.arguments.padding == (0, 0))


def _plans(call: _Call) -> List[str]:
    """The plans that are available."""
    found = []
    if _fits_one_pass(call):
        found = ['matrix product', 'one pass'] if _is_product(call) else ['one pass']
    found.append('native')
    if call.is_same_depthwise():
        g = call.geometry()
        if g.cropped().dtype != g.dtype:
            return ['fft']  # the others are slow, or never return
        found += ['contiguous' if g.channels_last else 'channels_last', 'fft']
    return found


def _expected_fastest(call: _Call, kept: Optional[Kept]) -> Optional[str]:
    """The plan without a measurement; None for standard operators."""
    fits = _fits_one_pass(call)
    if not call.is_same_depthwise():
        return None if not fits else 'matrix product' if _is_product(call) else 'one pass'
    backend = expected_fastest(call.geometry())
    if fits and backend in ('native', 'channels_last'):
        return 'one pass'
    return 'fft' if backend == 'fft' and kept is not None else None


def _compute(plan: Optional[str], call: _Call, kept: Optional[Kept]) -> torch.Tensor:
    """`fused_conv2d` by a plan; None stands for standard operators."""
    x, weight, bias, arguments, activation, residual = call
    if plan not in ('matrix product', 'one pass', 'fft'):
        return conv2d_in_steps(x, weight, bias, *arguments, activation, residual, plan)
    if call.is_same_depthwise():
        g = call.geometry()
        weight, (dy, dx) = g.crop(weight), g.margins
        arguments = arguments._replace(padding=(arguments.padding[0] - dy, arguments.padding[1] - dx))
    if plan == 'fft':
        if not fft.is_accurate(x, weight):
            return conv2d_in_steps(x, weight, bias, *arguments, activation, residual)
        kernel = None if kept is None else kept.derived(
            weight, ('fft', x.shape), fft.transform, x.shape[2], x.shape[3])
        return _finish(fft.conv(x, weight, bias, kernel), activation, residual)
    bias = None if bias is None else bias.contiguous()  # oneDNN ignores its strides
    fused = 'gelu' if activation == 'gelu' else 'none'
    added = residual if activation == 'none' else None
    if plan == 'matrix product':
        y = _product(x, weight, bias, fused, added, kept)
    else:
        y = _convolution(x, weight, bias, arguments, fused, added, kept)
    return _finish(y, 'relu' if activation == 'relu' else 'none', None if added is residual else residual)


def _convolution(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        arguments: _Arguments,
        activation: str,
        added: Optional[torch.Tensor],
        kept: Optional[Kept],
) -> torch.Tensor:
    """With a GELU or an addition."""
    stride, padding, dilation, groups = arguments
    if kept is not None:
        copy = kept.derived(
            weight, ('one pass', x.shape), _private.reordered_weight, padding, stride, dilation, groups, x.shape)
        weight = weight if copy is None else copy
    if added is not None:
        return _convolve.binary(
            x, added, weight, bias, padding, stride, dilation, groups, 'add', 1.0, None, [], None)
    return _convolve(x, weight, bias, padding, stride, dilation, groups, activation, [], 'none')


def _product(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        activation: str,
        added: Optional[torch.Tensor],
        kept: Optional[Kept],
) -> torch.Tensor:
    """A 1×1 convolution of a channels_last x as a matrix product, with a GELU or an addition."""
    b, c, h, w = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(-1, c)  # (B H W, C), a view
    matrix = weight.reshape(-1, c)
    if kept is not None:
        copy = kept.derived(weight, ('matrix product', x.shape), _private.reordered_matrix, rows.shape[0])
        matrix = matrix if copy is None else copy
    if added is not None:
        y = _multiply.binary(rows, added.permute(0, 2, 3, 1).reshape(-1, weight.shape[0]), matrix, bias, 'add')
    else:
        y = _multiply(rows, matrix, bias, activation, [], 'none')
    return y.view(b, h, w, -1).permute(0, 3, 1, 2)


def _finish(y: torch.Tensor, activation: str, residual: Optional[torch.Tensor]) -> torch.Tensor:
    """The activation, in place, and the residual. oneDNN's ReLU would turn NaN into 0."""
    if activation == 'relu':
        y.relu_()
    elif activation == 'gelu':
        torch.ops.aten.gelu_(y)
    return y if residual is None else y.add_(residual)


def _gelu(y: torch.Tensor) -> torch.Tensor:
    """GELU that overwrites y where nothing is recorded: a new tensor of that size costs more than the function."""
    if torch.jit.is_scripting():
        return F.gelu(y)
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return F.gelu(y)
    if _private.transforms_active():  # `gelu_` has no batching rule
        return F.gelu(y)
    return torch.ops.aten.gelu_(y)
