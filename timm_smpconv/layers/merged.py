"""What layers and blocks merge into, and what these are as modules of PyTorch.

Shapes: B batch, C channels, H and W height and width, L length, K kernel size.
"""
from collections import OrderedDict
from typing import Any, Callable, Dict, Optional, Tuple, Union, cast

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..ops import (
    ACTIVATIONS,
    Kept,
    causal_conv1d,
    conv2d_in_steps,
    fused_conv2d,
    large_conv2d,
    measure_dense,
    measure_fused,
)
from ._checks import forward_of

__all__ = [
    'MergedBlock', 'MergedConv1d', 'MergedConv2d', 'MergedLargeConv2d', 'MergedNorm', 'PlainBlock', 'causal_padding',
    'plain_convolution', 'reset_convolution']

_int_or_pair = Union[int, Tuple[int, int]]
_ACTIVATION_LAYERS: Dict[str, Callable[[], nn.Module]] = {'none': nn.Identity, 'relu': nn.ReLU, 'gelu': nn.GELU}


class MergedConv2d(nn.Conv2d):
    """A convolution with zero padding, its activation, and the addition of a residual if one is given.

    (B, C, H, W) → (B, out_channels, H', W').

    Args:
        activation: 'none', 'relu' or 'gelu', the exact one.
    """
    stride: Tuple[int, int]
    padding: Tuple[int, int]
    dilation: Tuple[int, int]

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: _int_or_pair,
            stride: _int_or_pair = 1,
            padding: _int_or_pair = 0,
            dilation: _int_or_pair = 1,
            groups: int = 1,
            bias: bool = True,
            activation: str = 'none',
            device=None,
            dtype=None,
    ):
        if activation not in ACTIVATIONS:
            raise ValueError(f'activation must be one of {", ".join(ACTIVATIONS)}, got {activation!r}')
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device=device, dtype=dtype)
        self.activation = activation
        self.kept = cast(Optional[Kept], None)  # TorchScript warns of an annotation here

    def reset_parameters(self) -> None:
        """Set the parameters to the start values of the unmerged network's convolutions."""
        reset_convolution(self)

    def forward(self, x: torch.Tensor, residual: Optional[torch.Tensor] = None) -> torch.Tensor:
        if torch.jit.is_scripting():
            return conv2d_in_steps(
                x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups, self.activation,
                residual)
        return fused_conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups, self.activation,
            residual, self.kept)

    def measure(self, x: torch.Tensor, residual: Optional[torch.Tensor] = None) -> None:
        """Let `kept` hold the fastest way to compute such inputs."""
        measure_fused(
            cast(Kept, self.kept), x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups,
            self.activation, residual)

    def to_plain(self) -> nn.Module:
        """The same as an `nn.Conv2d`, or as an `nn.Sequential` of `conv` and `act` if it has an activation."""
        if forward_of(self) is not MergedConv2d.forward:
            return self
        conv, act = _without_activation(self, nn.Identity())
        return _in_sequence(conv=conv, act=act)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, activation={self.activation}'


class MergedLargeConv2d(nn.Conv2d):
    """A convolution over all channels with an odd kernel that keeps the size, fast for kernels as large as the map.

    (B, C, H, W) → (B, out_channels, H, W).
    """

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: _int_or_pair,
            bias: bool = True,
            device=None,
            dtype=None,
    ):
        super().__init__(in_channels, out_channels, kernel_size, bias=bias, device=device, dtype=dtype)
        self.padding = (self.kernel_size[0] // 2, self.kernel_size[1] // 2)
        self.kept = cast(Optional[Kept], None)

    def reset_parameters(self) -> None:
        """Set the parameters to the start values of the unmerged network's small convolutions."""
        reset_convolution(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return large_conv2d(x, self.weight, self.bias)
        return large_conv2d(x, self.weight, self.bias, kept=self.kept)

    def measure(self, x: torch.Tensor) -> None:
        """Let `kept` hold the fastest way to compute such inputs."""
        measure_dense(cast(Kept, self.kept), x, self.weight, self.bias)

    def to_plain(self) -> nn.Module:
        """The same as an `nn.Conv2d`."""
        return plain_convolution(self) if forward_of(self) is MergedLargeConv2d.forward else self


def _conv1d(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        causal: bool = False,
        kept: Optional[Any] = None,  # TorchScript cannot read `Kept`
) -> torch.Tensor:
    """`F.conv1d`, by `causal_conv1d` where it keeps the length.

    Args:
        x: (B, C, L).
        weight: (O, C / groups, K).
        bias: (O,).
        stride: Of `F.conv1d`.
        padding: Of `F.conv1d`; ignored if `causal`.
        groups: Of `F.conv1d`.
        causal: Pad K - 1 zeros in front, and none behind.
        kept: See `causal_conv1d`.

    Returns:
        (B, O, L').
    """
    k = weight.shape[2]
    standard = torch.jit.is_scripting() or torch.jit.is_tracing() or stride != 1
    if standard or not (causal or (padding == k // 2 and k % 2 == 1)):
        if causal:
            x, padding = F.pad(x, [k - 1, 0]), 0
        return F.conv1d(x, weight, bias, [stride], [padding], groups=groups)
    if causal:
        return causal_conv1d(x, weight, bias, groups, kept=kept)
    return causal_conv1d(F.pad(x, [0, k // 2]), weight, bias, groups, kept=kept)[..., k // 2:].contiguous()


class MergedConv1d(nn.Conv1d):
    """A convolution with zero padding on both sides or, if causal, in front; fast for kernels as long as the input.

    (B, C, L) → (B, out_channels, L').
    """
    stride: Tuple[int]
    padding: Tuple[int]

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: int,
            stride: int = 1,
            padding: int = 0,
            groups: int = 1,
            bias: bool = True,
            causal: bool = False,
            device=None,
            dtype=None,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, 1, groups, bias, device=device, dtype=dtype)
        self.causal = causal
        self.kept = cast(Optional[Kept], None)

    def reset_parameters(self) -> None:
        """Set the parameters to the start values of the unmerged network's small convolutions."""
        reset_convolution(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return _conv1d(
                x, self.weight, self.bias, self.stride[0], self.padding[0], self.groups, self.causal)
        return _conv1d(
            x, self.weight, self.bias, self.stride[0], self.padding[0], self.groups, self.causal, self.kept)

    def measure(self, x: torch.Tensor) -> None:
        """Let `kept` hold the fastest way to compute such inputs."""
        k, padding = self.kernel_size[0], self.padding[0]
        if self.stride[0] == 1 and (self.causal or (padding == k // 2 and k % 2 == 1)):  # as in `_conv1d`
            x = x if self.causal else F.pad(x, [0, k // 2])
            measure_dense(cast(Kept, self.kept), x, self.weight, self.bias, self.groups)

    def to_plain(self) -> nn.Module:
        """The same as an `nn.Conv1d`, or as an `nn.Sequential` of `pad` and `conv` if it is causal."""
        if forward_of(self) is not MergedConv1d.forward:
            return self
        pad = causal_padding(self) if self.causal else nn.Identity()
        return _in_sequence(pad=pad, conv=plain_convolution(self))

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, causal={self.causal}'


MERGED_CONVS = (MergedConv1d, MergedConv2d, MergedLargeConv2d)


def reset_convolution(conv: Union[nn.Conv1d, nn.Conv2d]) -> None:
    """Set the parameters to the start values of the paper: a truncated normal of 0.02, and 0 for the bias."""
    nn.init.trunc_normal_(conv.weight, std=0.02)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


class MergedNorm(nn.Module):
    """The BatchNorm in front of a classifier as a 1×1 depthwise convolution, (B, C, H, W) → (B, C, H, W).

    It has a key of its own in the state dict: version 0.1.0 folded the norm into the classifier as well, so a merged
    checkpoint of that version must not load.
    """

    def __init__(self, conv: MergedConv2d):
        super().__init__()
        self.conv = conv
        self.training = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class MergedBlock(nn.Module):
    """`x + pw2(act2(dwconv(act1(pw1(x)))))`, (B, C, H, W) → (B, C, H, W).

    An activation that a `MergedConv2d` computes itself is an `nn.Identity` here. Feed-forward blocks have no `dwconv`
    and `act2`: they are `nn.Identity`, too.
    """

    def __init__(
            self,
            pw1: MergedConv2d,
            act1: nn.Module,
            dwconv: nn.Module,
            act2: nn.Module,
            pw2: MergedConv2d,
    ):
        super().__init__()
        self.pw1 = pw1
        self.act1 = act1
        self.dwconv = dwconv
        self.act2 = act2
        self.pw2 = pw2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act1(self.pw1(x))
        y = self.act2(self.dwconv(y))
        return self.pw2(y, x)

    def to_plain(self) -> nn.Module:
        """The same as a `PlainBlock`, in which an activation of a convolution is a layer of its own."""
        if forward_of(self) is not MergedBlock.forward:
            return self
        pw1, act1 = _without_activation(self.pw1, self.act1)
        dwconv, act2 = _without_activation(self.dwconv, self.act2)
        plain = PlainBlock(_without_identities(pw1=pw1, act1=act1, dwconv=dwconv, act2=act2, pw2=self.pw2))
        plain.training = self.training
        return plain


class PlainBlock(nn.ModuleDict):
    """Layers that follow each other, and a residual: `x + layers(x)`, (B, C, H, W) → (B, C, H, W).

    It is not an `nn.Sequential`: tools take those apart and would lose the residual.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for layer in self.values():
            y = layer(y)
        return x + y


def plain_convolution(conv: Any) -> Any:
    """The `nn.Conv2d` or `nn.Conv1d` with the geometry, parameters and mode of a merged convolution.

    Without its activation and, if it is causal, without padding.
    """
    kind = nn.Conv1d if isinstance(conv, MergedConv1d) else nn.Conv2d
    plain = kind(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
        conv.bias is not None, device='meta')
    plain.weight, plain.bias = conv.weight, conv.bias
    return plain.train(conv.training)


def causal_padding(conv: MergedConv1d) -> nn.Module:
    """The padding in front of a causal convolution, (B, C, L) → (B, C, L + K - 1)."""
    return nn.ConstantPad1d((conv.kernel_size[0] - 1, 0), 0.).train(conv.training)


def _without_activation(conv: nn.Module, act: nn.Module) -> Tuple[nn.Module, nn.Module]:
    """A `MergedConv2d` without its activation, and that activation with `act` behind it; others stay as they are."""
    if forward_of(conv) is not MergedConv2d.forward:
        return conv, act
    own = _ACTIVATION_LAYERS[cast(MergedConv2d, conv).activation]().train(conv.training)
    if isinstance(own, nn.Identity):
        return plain_convolution(conv), act
    return plain_convolution(conv), own if isinstance(act, nn.Identity) else nn.Sequential(own, act)


def _without_identities(**layers: nn.Module) -> 'OrderedDict[str, nn.Module]':
    return OrderedDict((name, layer) for name, layer in layers.items() if not isinstance(layer, nn.Identity))


def _in_sequence(**layers: nn.Module) -> nn.Module:
    """`conv` alone, or an `nn.Sequential` of it and the other layers that are not an `nn.Identity`."""
    found = _without_identities(**layers)
    return found['conv'] if len(found) == 1 else nn.Sequential(found).train(found['conv'].training)
