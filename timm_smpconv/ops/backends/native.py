"""PyTorch's own convolution: as it is, or with the input converted to one of the two memory formats.

Shapes: B batch, C channels, H and W height and width, K and L height and width of the kernel.
"""
from typing import Optional

import torch
import torch.nn.functional as F


def unsupported(x: torch.Tensor) -> Optional[str]:
    """None: it runs everywhere."""
    return None


def conv(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    """`F.conv2d` in the memory format of x."""
    return F.conv2d(x, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2), groups=weight.shape[0])


def corr(grad: torch.Tensor, x: torch.Tensor, k: int, l: int) -> torch.Tensor:
    """The weight gradient of `conv`, (C, 1, K, L)."""
    weight = x.new_empty(1).expand(x.shape[1], 1, k, l)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, (1, 1), (k // 2, l // 2), (1, 1), False, (0, 0), x.shape[1], (False, True, False))[1]


def input_gradient(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The input gradient of `conv`, (B, C, H, W)."""
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, (1, 1), padding, (1, 1), False, (0, 0), x.shape[1], (True, False, False))[0]


def contiguous_conv(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    """`F.conv2d` in the contiguous format."""
    return conv(x.contiguous(), weight, bias)


def contiguous_corr(grad: torch.Tensor, x: torch.Tensor, k: int, l: int) -> torch.Tensor:
    """The weight gradient in the contiguous format, (C, 1, K, L)."""
    return corr(grad.contiguous(), x.contiguous(), k, l)


def channels_last_conv(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    """`F.conv2d` in channels_last."""
    return conv(x.contiguous(memory_format=torch.channels_last), weight, bias)


def channels_last_corr(grad: torch.Tensor, x: torch.Tensor, k: int, l: int) -> torch.Tensor:
    """The weight gradient in channels_last, computed in float32 at least, (C, 1, K, L)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    grad, x = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (grad, x))
    return corr(grad, x, k, l)
