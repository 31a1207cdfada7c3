"""PyTorch's own convolution: as it is, or with the input converted to one of the two memory formats.

Shapes: B batch, C channels, H and W height and width, KH and KW height and width of the kernel.
"""
from typing import Optional, Tuple

import torch
import torch.nn.functional as F


def memory_format(x: torch.Tensor) -> torch.memory_format:
    """channels_last if x (B, C, H, W) has that layout and no other, else contiguous."""
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def unsupported(x: torch.Tensor) -> Optional[str]:
    """None: it runs everywhere."""
    return None


def conv(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    """`F.conv2d` in the memory format of x."""
    channels, _, kh, kw = weight.shape
    return F.conv2d(x, weight, bias, padding=(kh // 2, kw // 2), groups=channels)


def input_gradient(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The input gradient of `conv`, (B, C, H, W)."""
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, (1, 1), padding, (1, 1), False, (0, 0), x.shape[1], (True, False, False))[0]


def weight_gradient(grad: torch.Tensor, x: torch.Tensor, kh: int, kw: int) -> torch.Tensor:
    """The weight gradient of `conv`, (C, 1, KH, KW)."""
    weight = x.new_empty(1).expand(x.shape[1], 1, kh, kw)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, (1, 1), (kh // 2, kw // 2), (1, 1), False, (0, 0), x.shape[1], (False, True, False))[1]


def gradients(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Both gradients of `conv`, with regard to x and weight, by one call."""
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, (1, 1), padding, (1, 1), False, (0, 0), x.shape[1], (True, True, False))[:2]


def contiguous_conv(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    """`F.conv2d` in the contiguous format."""
    return conv(x.contiguous(), weight, bias)


def contiguous_weight_gradient(grad: torch.Tensor, x: torch.Tensor, kh: int, kw: int) -> torch.Tensor:
    """The weight gradient in the contiguous format, (C, 1, KH, KW)."""
    return weight_gradient(grad.contiguous(), x.contiguous(), kh, kw)


def channels_last_conv(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    """`F.conv2d` in channels_last."""
    return conv(x.contiguous(memory_format=torch.channels_last), weight, bias)


def channels_last_weight_gradient(grad: torch.Tensor, x: torch.Tensor, kh: int, kw: int) -> torch.Tensor:
    """The weight gradient in channels_last, computed in float32 at least, (C, 1, KH, KW)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    grad, x = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (grad, x))
    return weight_gradient(grad, x, kh, kw)
