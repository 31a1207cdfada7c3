"""What the blocks of a network merge into: plain convolutions, each with its activation.

Shapes: B batch, C channels, H and W height and width.
"""
from typing import Optional, Tuple

import torch
import torch.nn as nn

from .ops import ACTIVATIONS, PackedWeight, conv2d_in_steps, fused_conv2d

__all__ = ['MergedBlock', 'MergedConv2d', 'prepack']


class MergedConv2d(nn.Conv2d):
    """A convolution with zero padding and the activation behind it; adds `residual` if there is one.

    (B, C, H, W) → (B, out_channels, H', W'). In evaluation mode and without values: merging puts them in.

    Args:
        activation: 'none', 'relu' or 'gelu'.
    """

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: Tuple[int, int],
            stride: Tuple[int, int] = (1, 1),
            padding: Tuple[int, int] = (0, 0),
            dilation: Tuple[int, int] = (1, 1),
            groups: int = 1,
            bias: bool = True,
            activation: str = 'none',
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device='meta')
        if activation not in ACTIVATIONS:
            raise ValueError(f'activation must be one of {", ".join(ACTIVATIONS)}, got {activation!r}')
        self.activation = activation
        self.packed: Optional[PackedWeight] = None
        self.eval()

    def forward(self, x: torch.Tensor, residual: Optional[torch.Tensor] = None) -> torch.Tensor:
        if torch.jit.is_scripting():
            return conv2d_in_steps(
                x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups, self.activation,
                residual)
        return fused_conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups, self.activation,
            residual, self.packed)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, activation={self.activation}'


class MergedBlock(nn.Module):
    """`x + pw2(dwconv(pw1(x)))`, (B, C, H, W) → (B, C, H, W); feed-forward blocks have an `nn.Identity` as `dwconv`."""

    def __init__(self, pw1: MergedConv2d, dwconv: nn.Module, pw2: MergedConv2d):
        super().__init__()
        self.pw1 = pw1
        self.dwconv = dwconv
        self.pw2 = pw2
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pw2(self.dwconv(self.pw1(x)), x)


def prepack(model: nn.Module) -> nn.Module:
    """Freeze a merged model and let it keep a copy of its weights as oneDNN wants them, on a CPU with AVX-512.

    Without, they are copied at every forward pass. A copy is made at the first pass without gradients, and again when
    the size of the input or the weights change. Changes that PyTorch does not count (in place through `.data` or NumPy,
    by another process) are not seen: prepack again. The copies need as much memory as the weights. Weights that are made
    to require gradients again are not kept; where `fused_conv2d` does not compute in one pass, nothing is.

    Args:
        model: Merged by `timm.utils.reparameterize_model`, or holding such models. It is changed in place.

    Returns:
        The model, its parameters without `requires_grad`.

    Raises:
        ValueError: There is no merged convolution in the model.
    """
    convolutions = [m for m in model.modules() if isinstance(m, MergedConv2d)]
    if not convolutions:
        raise ValueError(
            f'model must be merged (timm.utils.reparameterize_model), got {type(model).__name__} without a '
            'MergedConv2d')
    for conv in convolutions:
        conv.packed = PackedWeight()
    return model.requires_grad_(False)
