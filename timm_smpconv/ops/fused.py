"""A convolution with its activation and a residual in one pass of oneDNN: what merged models consist of.

`torch.compile` does the same with frozen weights, after half a minute and with a C++ compiler. This needs neither.

Before every convolution oneDNN copies the weight into a format of its own. That is a fifth of the time at batch 1 in
float32, unless a copy is kept. `smpconv_tiny`, merged, channels_last, batch 1, on 2 cores with AVX-512 and torch 2.14:
86 ms in float32 and 55 in bfloat16 operator by operator, 82 and 50 in one pass, 64 and 40 with kept copies.

Shapes: B batch, C and O channels in and out, H and W height and width, K and L height and width of the kernel.
"""
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.fx
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function

from . import choice, private
from .depthwise import check_exportable, depthwise_conv2d

__all__ = ['ACTIVATIONS', 'PackedWeight', 'conv2d_in_steps', 'fused_conv2d']

ACTIVATIONS = ('none', 'relu', 'gelu')

# With AVX2 too oneDNN has programs of its own for all that is fused here (`ONEDNN_VERBOSE=1` names them: brgconv_1x1,
# brg_conv_fwd, brgdmm_dw); elsewhere it may compute an activation by its reference program.
ENABLED = torch.backends.cpu.get_cpu_capability() in ('AVX512', 'AVX2')
_DTYPES = choice.ONEDNN_DTYPES & {torch.float32, torch.bfloat16}
_convolve: Any = private.pointwise_convolution()


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
        """The cached copy, rebuilt if the weight or the size of x changed; the weight itself if it cannot be cached."""
        # Such weights can change without a new version: fused optimizers count none.
        if weight.is_inference() or weight.requires_grad:
            return weight
        made_for = (weight.data_ptr(), weight._version, weight.shape, weight.stride(), weight.dtype, x.shape)
        kept = self._kept  # read once: threads may share it
        if kept is None or kept[0] != made_for:
            packed = private.reordered_weight(weight, padding, stride, dilation, groups, x.shape)
            if packed is None:
                return weight
            # Holding the weight, too, keeps its address from being reused.
            kept = self._kept = made_for, packed, weight.detach()
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

    Computed in one pass on CPUs with AVX-512, in float32 and bfloat16, for channels_last inputs, where nothing is
    recorded, compiled or exported. Otherwise step by step.

    Args:
        x: (B, C, H, W).
        weight: (O, C / groups, K, L).
        bias: (O,).
        stride: Of `F.conv2d`, a pair.
        padding: Of `F.conv2d`, a pair.
        dilation: Of `F.conv2d`, a pair.
        groups: Of `F.conv2d`.
        activation: One of `ACTIVATIONS`; 'gelu' is the exact one, with the error function.
        residual: (B, O, H', W'), the shape of the result. It is not changed.
        packed: Keeps the weight in oneDNN's format from one call to the next, if it does not require gradients.

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
            fused_conv2d, inputs, x, weight, bias, stride, padding, dilation, groups, activation, residual, packed)
    if torch.jit.is_tracing() and groups > 1:
        check_exportable(choice.requested_backend())
    if not _fuses(inputs, x, weight, stride, padding, dilation, groups, residual):
        return conv2d_in_steps(x, weight, bias, stride, padding, dilation, groups, activation, residual)
    if _is_same_depthwise(weight, stride, padding, dilation, groups):
        dy, dx = choice.margins(x, weight.shape[2], weight.shape[3])
        weight = weight[:, :, dy:weight.shape[2] - dy, dx:weight.shape[3] - dx]
        padding = (padding[0] - dy, padding[1] - dx)
    if packed is not None:
        weight = packed.of(weight, x, stride, padding, dilation, groups)
    if residual is not None and activation == 'none':
        return _convolve.binary(
            x, residual, weight, bias, padding, stride, dilation, groups, 'add', 1.0, None, [], None)
    y = _convolve(
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
    """`fused_conv2d` by standard operators and `depthwise_conv2d`, for TorchScript too."""
    if not torch.jit.is_tracing() and _is_same_depthwise(weight, stride, padding, dilation, groups):
        y = depthwise_conv2d(x, weight, bias)
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
    """Whether one pass is available, fast and equivalent.

    Invalid inputs are not fused: they fall through to the standard operators, which raise.
    """
    if not ENABLED or x.device.type != 'cpu' or x.dtype not in _DTYPES or not torch.backends.mkldnn.enabled:
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled('cpu'):
        return False
    if private.transforms_active() or private.forward_ad_active() or private.dispatch_mode_active():
        return False
    if choice.requested_backend() is not None or _convolve is None:
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
    if min(size) < 1 or choice.memory_format(x) != torch.channels_last:
        return False
    if residual is not None:
        if residual.shape != (x.shape[0], weight.shape[0], *size):
            return False
        if choice.memory_format(residual) != torch.channels_last:
            return False
    if not _is_same_depthwise(weight, stride, padding, dilation, groups):
        return True
    k, l = weight.shape[2:]
    _, dx = choice.margins(x, k, l)
    if choice.working_dtype(x, l - 2 * dx) != x.dtype:
        return False
    return choice.choose('output', x, k, l) in ('native', 'channels_last')


def _gelu(y: torch.Tensor) -> torch.Tensor:
    """GELU that overwrites y where nothing is recorded: a new tensor of that size costs more than the function."""
    if torch.jit.is_scripting():
        return F.gelu(y)
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return F.gelu(y)
    return torch.ops.aten.gelu_(y)
