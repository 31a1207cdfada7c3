"""A convolution with its activation and a residual in one pass of oneDNN: what merged models consist of.

`torch.compile` does the same with frozen weights, after half a minute and with a C++ compiler; this needs neither.

Before every convolution oneDNN copies the weight into a format of its own, a fifth of the time at batch 1 in float32,
unless it is given a copy that was kept. `smpconv_tiny`, merged, channels_last, batch 1, on 2 cores with AVX-512 and
torch 2.14: 86 ms in float32 and 55 in bfloat16 operator by operator, 82 and 50 in one pass, 64 and 40 with kept copies.
"""
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.fx
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from . import depthwise

__all__ = ['ACTIVATIONS', 'PackedWeight', 'conv2d_in_steps', 'fused_conv2d']

ACTIVATIONS = ('none', 'relu', 'gelu')

# PyTorch's own operators for its compiler: they have to be those known here.
_ARGUMENTS = 'X W B padding stride dilation groups attr scalars algorithm'
_ARGUMENTS_ADDED = (
    'X other W B padding stride dilation groups binary_attr alpha unary_attr unary_scalars unary_algorithm')


def _operators_known() -> bool:
    operator = getattr(torch.ops.mkldnn, '_convolution_pointwise', None)
    if operator is None or not {'default', 'binary'} <= set(operator.overloads()):
        return False
    names = [' '.join(a.name for a in o._schema.arguments) for o in (operator.default, operator.binary)]
    return names == [_ARGUMENTS, _ARGUMENTS_ADDED]


# Measured with AVX-512 alone; elsewhere oneDNN may compute an activation by its reference program.
_DTYPES = depthwise._ONEDNN_DTYPES & {torch.float32, torch.bfloat16}
_FUSES = torch.backends.cpu.get_cpu_capability() == 'AVX512' and _operators_known()


class PackedWeight:
    """The copy of a weight in oneDNN's own format, for the last size of input; copied and pickled without it."""

    def __init__(self):
        self._kept = None

    def __getstate__(self) -> Dict[str, Any]:
        return {'_kept': None}

    def of(
            self,
            weight: torch.Tensor,
            x: torch.Tensor,
            stride: Tuple[int, int],
            padding: Tuple[int, int],
            dilation: Tuple[int, int],
            groups: int,
    ) -> torch.Tensor:
        if weight.is_inference() or weight.requires_grad:  # could change unseen: fused optimizers count no version
            return weight
        made_for = (weight.data_ptr(), weight._version, weight.shape, weight.stride(), weight.dtype, x.shape)
        kept = self._kept  # once: threads may share it
        if kept is None or kept[0] != made_for:
            packed = torch._C._nn.mkldnn_reorder_conv2d_weight(
                weight.detach().contiguous().to_mkldnn(), padding, stride, dilation, groups, x.shape)
            kept = self._kept = made_for, packed, weight.detach()  # while that lives, its address is no other's
        return kept[1]


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
        packed: Optional[PackedWeight] = None,
) -> torch.Tensor:
    """`activation(F.conv2d(x, weight, bias, stride, padding, dilation, groups)) + residual`.

    In one pass where nothing is recorded, compiled or exported, on a CPU with AVX-512, in float32 and bfloat16, for
    images in channels_last; step by step otherwise.

    Args:
        x: (B, C, H, W).
        weight: (O, C / groups, K, L).
        bias: (O,).
        activation: Of `ACTIVATIONS`; GELU is the exact one.
        stride, padding, dilation: Pairs.
        residual: (B, O, H', W'), the shape of the result; it is not changed.
        packed: Where to keep a weight that does not require gradients, in oneDNN's format, from one call to the next.

    Returns:
        (B, O, H', W'). GELU in one pass makes NaN of infinity; all else is the same.
    """
    inputs = [t for t in (x, weight, bias, residual) if t is not None]
    if has_torch_function(inputs):
        if any(isinstance(t, torch.fx.Proxy) for t in inputs):  # whose graph TorchScript may be asked to take
            return handle_torch_function(
                conv2d_in_steps, inputs, x, weight, bias, stride, padding, dilation, groups, activation, residual)
        return handle_torch_function(
            fused_conv2d, inputs, x, weight, bias, stride, padding, dilation, groups, activation, residual, packed)
    if torch.jit.is_tracing() and groups > 1:
        depthwise._stays_native(x)  # or a backend was forced in vain
    if not _fuses(inputs, x, weight, stride, padding, dilation, groups, residual):
        return conv2d_in_steps(x, weight, bias, stride, padding, dilation, groups, activation, residual)
    if _is_same_depthwise(weight, stride, padding, dilation, groups):
        dy, dx = depthwise._margins(x, weight.shape[2], weight.shape[3])
        weight = weight[:, :, dy:weight.shape[2] - dy, dx:weight.shape[3] - dx]
        padding = (padding[0] - dy, padding[1] - dx)
    if packed is not None:
        weight = packed.of(weight, x, stride, padding, dilation, groups)
    if residual is not None and activation == 'none':
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual, weight, bias, padding, stride, dilation, groups, 'add', 1.0, None, [], None)
    y = torch.ops.mkldnn._convolution_pointwise(
        x, weight, bias, padding, stride, dilation, groups, 'gelu' if activation == 'gelu' else 'none', [], 'none')
    if activation == 'relu':
        y.relu_()  # oneDNN's turns NaN into 0
    return y if residual is None else y.add_(residual)


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
) -> torch.Tensor:
    """The same by standard operators and `depthwise_conv2d`, for TorchScript too."""
    if not torch.jit.is_tracing() and _is_same_depthwise(weight, stride, padding, dilation, groups):
        y = depthwise.depthwise_conv2d(x, weight, bias)
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
    """Whether `depthwise_conv2d` computes this convolution."""
    channels, inputs, k, l = weight.shape
    if groups != channels or inputs != 1 or k % 2 == 0 or l % 2 == 0:
        return False
    ones = stride[0] == 1 and stride[1] == 1 and dilation[0] == 1 and dilation[1] == 1
    return ones and padding[0] == k // 2 and padding[1] == l // 2


def _fuses(
        inputs: List[torch.Tensor],
        x: torch.Tensor,
        weight: torch.Tensor,
        stride: Tuple[int, int],
        padding: Tuple[int, int],
        dilation: Tuple[int, int],
        groups: int,
        residual: Optional[torch.Tensor],
) -> bool:
    """Whether one pass is possible here, measured, and the same; what is not right is left to others to refuse."""
    if not _FUSES or x.device.type != 'cpu' or x.dtype not in _DTYPES or not torch.backends.mkldnn.enabled:
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled('cpu'):
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or depthwise._forced is not None:
        return False
    if torch._C._len_torch_dispatch_stack() > 0:  # somebody counts operations, or follows them, and knows these not
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return False
    if any(t.dtype != x.dtype or t.device != x.device for t in inputs):
        return False
    if x.ndim != 4 or weight.ndim != 4 or x.numel() == 0 or x.shape[1] != weight.shape[1] * groups:
        return False
    if min(stride) < 1:
        return False
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(x.shape[2:], padding, dilation, weight.shape[2:], stride)]
    if min(size) < 1 or depthwise._memory_format(x) != torch.channels_last:
        return False
    if residual is not None:
        if residual.shape != (x.shape[0], weight.shape[0], *size):
            return False
        if depthwise._memory_format(residual) != torch.channels_last:
            return False
    if not _is_same_depthwise(weight, stride, padding, dilation, groups):
        return True
    dy, dx = depthwise._margins(x, weight.shape[2], weight.shape[3])
    k, l = weight.shape[2] - 2 * dy, weight.shape[3] - 2 * dx
    chosen = depthwise._choose(depthwise.CONV_RULES, x, k, l)
    return chosen in ('native', 'channels_last') and depthwise._working_dtype(x, l) == x.dtype


def _gelu(y: torch.Tensor) -> torch.Tensor:
    """GELU that overwrites y where nothing is recorded: a new tensor of that size costs more than the function."""
    if torch.jit.is_scripting():
        return F.gelu(y)
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return F.gelu(y)
    return torch.ops.aten.gelu_(y)
