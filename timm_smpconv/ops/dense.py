"""Convolutions over channels with kernels as large as the input: causal in one dimension, "same" in two.

Shapes: B batch, I and O channels in and out, L length (1-D), H and W height and width, K (and L in 2-D) kernel size.
"""
from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function

from .choice import check_backend, requested_backend
from .depthwise import check_exportable, is_exporting

__all__ = ['PackedKernel', 'causal_conv1d', 'large_conv2d']


class PackedKernel:
    """The transform of a kernel, for the last size of input; copied and pickled without it."""

    def __init__(self):
        self._kept = None

    def __getstate__(self) -> Dict[str, Any]:
        return {'_kept': None}


def causal_conv1d(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor] = None,
        groups: int = 1,
        backend: Optional[str] = None,
        packed: Optional[Any] = None,
) -> torch.Tensor:
    """`F.conv1d(F.pad(x, (K - 1, 0)), weight, bias, groups=groups)`, fast for kernels as long as the sequence.

    Args:
        x: (B, I, L).
        weight: (O, I / groups, K), any K: taps older than the sequence meet nothing but padding.
        bias: (O,).
        groups: Of `F.conv1d`.
        backend: 'native' or 'fft' for this call and its gradients.
        packed: A `PackedKernel`, which keeps the kernel's transform from one call to the next, if the weight does not
            require gradients.

    Returns:
        (B, O, L).

    Raises:
        ValueError: A shape or a device breaks the rules above, or the requested backend cannot run.
        TypeError: The dtypes differ (outside autocast) or are not floating point.

    Example:
        >>> x, weight = torch.randn(2, 3, 1000), torch.randn(4, 3, 1000)
        >>> causal_conv1d(x, weight).shape
        torch.Size([2, 4, 1000])
    """
    if torch.jit.is_scripting():
        return F.conv1d(F.pad(x, [weight.shape[2] - 1, 0]), weight, bias, groups=groups)
    inputs = (x, weight) if bias is None else (x, weight, bias)
    if has_torch_function(inputs):
        return handle_torch_function(causal_conv1d, inputs, x, weight, bias, groups, backend, packed)
    x, weight, bias, _ = _prepare('L', x, weight, bias, groups, backend)
    return F.conv1d(F.pad(x, (weight.shape[2] - 1, 0)), weight, bias, groups=groups)


def large_conv2d(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor] = None,
        backend: Optional[str] = None,
        packed: Optional[Any] = None,
) -> torch.Tensor:
    """`F.conv2d(x, weight, bias, padding=(K // 2, L // 2))`, fast for kernels as large as the map.

    Args:
        x: (B, I, H, W).
        weight: (O, I, K, L) with odd K and L.
        bias: (O,).
        backend: 'native', 'contiguous', 'channels_last' or 'fft' for this call and its gradients.
        packed: A `PackedKernel`, which keeps the kernel's transform from one call to the next, if the weight does not
            require gradients.

    Returns:
        (B, O, H, W).

    Raises:
        ValueError: A shape or a device breaks the rules above, or the requested backend cannot run.
        TypeError: The dtypes differ (outside autocast) or are not floating point.

    Example:
        >>> x, weight = torch.randn(2, 3, 16, 16), torch.randn(4, 3, 17, 17)
        >>> large_conv2d(x, weight).shape
        torch.Size([2, 4, 16, 16])
    """
    if torch.jit.is_scripting():
        return F.conv2d(x, weight, bias, padding=[weight.shape[2] // 2, weight.shape[3] // 2])
    inputs = (x, weight) if bias is None else (x, weight, bias)
    if has_torch_function(inputs):
        return handle_torch_function(large_conv2d, inputs, x, weight, bias, backend, packed)
    x, weight, bias, _ = _prepare('H, W', x, weight, bias, 1, backend)
    return F.conv2d(x, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2))


def _prepare(
        size: str,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        groups: int,
        backend: Optional[str],
) -> Tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor], Optional[str]]:
    """Checked inputs in the dtype to compute in, and the requested backend."""
    if backend is None:
        backend = requested_backend()
    else:
        check_backend('backend', backend)
    if x.device.type != 'meta' and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = (
            t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
            for t in (x, weight, bias))
    if is_exporting():
        check_exportable(backend)
    return x, weight, bias, backend
