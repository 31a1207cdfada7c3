"""The small convolutions beside large kernels: depthwise, and causal.

Shapes: B batch, C channels, H and W height and width, L length, K kernel size.
"""
import math
from typing import List, Tuple, Union

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F

from ..ops import depthwise_conv2d
from ._checks import check_odd
from .merged import _conv1d, reset_convolution

__all__ = ['CausalConv1d', 'DepthwiseConv2d', 'resample']

_int_or_pair = Union[int, Tuple[int, int]]


class CausalConv1d(nn.Conv1d):
    """The `nn.Conv1d` of stride 1 that sees the current and earlier samples only, padded with zeros in front.

    (B, in_channels, L) → (B, out_channels, L).
    """
    causal = True

    def reset_parameters(self) -> None:
        """Set the parameters to the start values of the sequence networks."""
        reset_convolution(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _conv1d(x, self.weight, self.bias, causal=True)


@torch.fx.wrap
def resample(weight: torch.Tensor, scale: float, size: List[int]) -> torch.Tensor:
    """Kernels, (C, 1, K, L), for a map that is `scale` times as dense: (C, 1, *size), odd, in float32 at least.

    The taps move `scale` steps apart and are interpolated linearly. Each keeps its sum over the samples, so the
    response to a constant map stays the same.
    """
    weight = weight if weight.dtype == torch.float64 else weight.float()
    rows = _hats(weight, weight.shape[2], scale, size[0])
    columns = _hats(weight, weight.shape[3], scale, size[1])
    weight = (rows.unsqueeze(-1) * weight.unsqueeze(2)).sum(3)  # (C, 1, size[0], L)
    return (weight.unsqueeze(3) * columns).sum(4)


def _hats(like: torch.Tensor, taps: int, scale: float, size: int) -> torch.Tensor:
    """How much each of `taps` taps, `scale` steps apart, gives to each of `size` samples; (size, taps)."""
    tap = (torch.arange(taps, device=like.device, dtype=like.dtype) - taps // 2) * scale
    sample = torch.arange(size, device=like.device, dtype=like.dtype) - size // 2
    hats = F.relu(1 - (sample.unsqueeze(1) - tap).abs() / max(scale, 1.))
    return hats / hats.sum(0)


class DepthwiseConv2d(nn.Conv2d):
    """The depthwise `nn.Conv2d` of stride 1 that keeps the size, computed by `depthwise_conv2d`.

    (B, C, H, W) → (B, C, H, W).

    Attributes:
        scale: How many times as dense as in training the map is, see `resample`; 1 unless `rescale` was called.
        size: Size of the kernel at this scale. `weight` and `kernel_size` do not change.
    """

    def __init__(self, channels: int, kernel_size: _int_or_pair, bias: bool = True, device=None, dtype=None):
        size = check_odd('kernel_size', kernel_size)
        padding = (size[0] // 2, size[1] // 2)
        super().__init__(
            channels, channels, size, padding=padding, groups=channels, bias=bias, device=device, dtype=dtype)
        self.scale = 1.
        self.size = list(size)

    def rescale(self, scale: float, largest: Tuple[int, ...]) -> None:
        """Resample the kernel for a map that is `scale` times as dense as in training, within the size `largest`."""
        self.scale = float(scale)
        sizes = (2 * math.ceil(scale * (k // 2) + max(scale, 1)) - 1 for k in self.kernel_size)
        self.size = list(map(min, sizes, largest))
        self.padding = tuple(k // 2 for k in self.size)

    def render(self) -> torch.Tensor:
        """The weight of the convolution, (C, 1, *size)."""
        if self.scale == 1:
            return self.weight
        return resample(self.weight, self.scale, self.size).to(self.weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return depthwise_conv2d(x, self.render(), self.bias)
