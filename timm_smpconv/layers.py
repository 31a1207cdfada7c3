"""The modules around an SMP kernel, and how each merges into plain convolutions.

Shapes: B batch, C channels, H and W height and width, L length, K kernel size, O and I output and input channels.

`fuse()` follows timm's protocol (`timm.utils.reparameterize_model`): it returns the module that takes the module's
place and leaves the module itself unchanged. It raises `MergeError` in training mode, and for a part that it cannot
fold exactly: one with a `forward` of its own, say.
"""
import math
import operator
from collections import OrderedDict
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Callable, List, Optional, Tuple, Union

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, to_2tuple

from . import folding
from .checkpoint import CheckedLoading
from .folding import Convolution, absorb, affine, forward_of, refused
from .kernel import SMPKernel, crop_unreached
from .merged import MergedBlock, check_mode, conv1d, merge, reset_convolution
from .ops import depthwise_conv2d, large_conv2d

__all__ = [
    'CausalConv1d', 'ConvNorm', 'DenseRepSMPConv2d', 'DepthwiseConv2d', 'RepConv', 'RepSMPConv1d', 'RepSMPConv2d',
    'SMPConv1d', 'SMPConv2d', 'check_images', 'check_sequences', 'dilated_size', 'merged_block',
    'odd_sizes']

_int_or_pair = Union[int, Tuple[int, int]]

torch.fx.wrap('crop_unreached')  # FX wraps a function in one module at a time


@torch.fx.wrap
def check_images(x: torch.Tensor, channels: int, least: int = 1) -> None:
    """Raise an error unless x is (B, channels, H, W), floating point, with H and W at least `least`.

    One node in an FX graph, and nothing in a trace.
    """
    if torch.jit.is_tracing():
        return
    if not torch.jit.is_scripting() and not isinstance(x, torch.Tensor):
        raise TypeError(f'x must be a tensor of shape (B, {channels}, H, W), got {type(x).__name__}')
    if x.ndim != 4 or x.shape[1] != channels or x.shape[2] < least or x.shape[3] < least:
        raise ValueError(f'x must be (B, {channels}, H, W) with H and W at least {least}, got shape {list(x.shape)}')
    if not x.is_floating_point():
        raise TypeError(f'x must be floating point, got {x.dtype}')


@torch.fx.wrap
def check_sequences(x: torch.Tensor, channels: int) -> None:
    """Raise an error unless x is (B, channels, L), floating point, with L at least 1.

    One node in an FX graph, and nothing in a trace.
    """
    if torch.jit.is_tracing():
        return
    if not torch.jit.is_scripting() and not isinstance(x, torch.Tensor):
        raise TypeError(f'x must be a tensor of shape (B, {channels}, L), got {type(x).__name__}')
    if x.ndim != 3 or x.shape[1] != channels or x.shape[2] < 1:
        raise ValueError(f'x must be (B, {channels}, L) with L at least 1, got shape {list(x.shape)}')
    if not x.is_floating_point():
        raise TypeError(f'x must be floating point, got {x.dtype}')


class CausalConv1d(nn.Conv1d):
    """The `nn.Conv1d` of stride 1 that sees the current and earlier samples only, padded with zeros in front.

    (B, in_channels, L) → (B, out_channels, L).
    """
    causal = True

    def reset_parameters(self) -> None:
        """Set the parameters to the start values of the sequence networks."""
        reset_convolution(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return conv1d(x, self.weight, self.bias, causal=True)


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
        size = _check_odd('kernel_size', kernel_size)
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


class _SMPConv(CheckedLoading):
    """What `SMPConv1d` and `SMPConv2d` share: the kernel, the bias, rendering, resizing and merging."""
    if TYPE_CHECKING:  # TorchScript would read these
        kernel_size: Any
        padding: Any

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: Tuple[int, ...],
            dilation: Tuple[int, ...],
            groups: int,
            bias: bool,
            padding_mode: str,
            points: int,
            average: Optional[bool],
            device=None,
            dtype=None,
            **kernel_args: Any,
    ):
        super().__init__()
        for name, channels in (('in_channels', in_channels), ('out_channels', out_channels)):
            if groups < 1 or channels < 1 or channels % groups:
                raise ValueError(f'{name} must be a positive multiple of groups = {groups}, got {channels}')
        if set(dilation) != {1}:
            raise ValueError(f'dilation must be 1: render a larger kernel_size instead, got {dilation[0]}')
        if padding_mode != 'zeros':
            raise ValueError(f"padding_mode must be 'zeros', got {padding_mode!r}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.dilation = kernel_size, dilation
        self.built_size = kernel_size  # to which the `scale` of `resize_kernels` refers
        self.depthwise = _is_depthwise(in_channels, out_channels, groups)
        if self.depthwise:
            shape: Any = dict(channels=in_channels)
        else:
            shape = dict(channels=in_channels // groups, groups=out_channels)
        average = not self.depthwise if average is None else average
        self.kernel = SMPKernel(
            size=kernel_size, points=points, average=average, **shape, **kernel_args, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(out_channels, device=device, dtype=dtype)) if bias else None

    def render(self) -> torch.Tensor:
        """The weight of the convolution, (O, I / groups, *K), in float32 at least."""
        return self.kernel().transpose(0, 1) if self.depthwise else self.kernel()

    def _check_size(self, kernel_size: Any) -> Tuple[int, ...]:
        """kernel_size in a tuple; raises a ValueError if a kernel cannot have it."""
        raise NotImplementedError

    def check_resize(self, kernel_size: Any) -> Tuple[Tuple[int, ...], Tuple[int, ...]]:
        """The size and the padding that `resize` would set; raises its ValueError if it would."""
        size, native = self._check_size(kernel_size), tuple(self.kernel.native_size)
        if any((k == 1) != (n == 1) for k, n in zip(size, native)):
            raise ValueError(
                f'kernel_size must be at least 3 on each axis, and 1 where it was built with 1 sample, got {size} for '
                f'a kernel of {native}')
        padding = tuple(p and p + k // 2 - old // 2 for p, k, old in zip(self.padding, size, self.kernel_size))
        if any(p > 0 and new < 1 for p, new in zip(self.padding, padding)):
            raise ValueError(
                f'kernel_size must leave some of the padding {self.padding}, which shrinks as the kernel does from '
                f'{self.kernel_size}, got {size}')
        return size, padding

    def resize(self, kernel_size: Any) -> Any:
        """Render the kernel at another size from now on, scaled so that it stays the same continuous convolution.

        The kernel is a function on [-1, 1] per axis. At K' samples instead of the K it was built with they lie
        (K - 1) / (K' - 1) times as far apart; entries are multiplied by this ratio, once per axis, so that their sum
        keeps approximating the same integral and the response to a constant input stays the same (`SMPKernel.resize`
        has the mathematics). For an input sampled s times as densely take K' = s * (K - 1) + 1.

        Parameters do not change: the state dict is the same at every size. Merging takes the size of that moment.

        Padding changes by as much as half the kernel, so that outputs keep their size and place; without padding there
        is none afterwards, and outputs get smaller or larger.

        Args:
            kernel_size: Odd and at least 3 (a causal `SMPConv1d`: at least 2); an axis that was built with 1 sample
                keeps it.

        Returns:
            This module.

        Raises:
            ValueError: kernel_size breaks these rules, or would leave no padding where there was some. Nothing is
                changed then.

        Example:
            >>> SMPConv2d(8, 8, 31, padding=15, groups=8).resize(61)
            SMPConv2d(
              8, 8, kernel_size=(61, 61), stride=(1, 1), padding=(30, 30), groups=8, bias=True
              (kernel): SMPKernel(8, size=(61, 61), points=240, groups=1, average=False, native_size=(31, 31))
            )
        """
        size, padding = self.check_resize(kernel_size)
        self.kernel.resize(size)
        self.kernel_size, self.padding = size, padding
        return self

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """The same convolution as a plain module."""
        check_mode(self)
        return folding.values(self, '').build()


def _is_depthwise(in_channels: int, out_channels: int, groups: int) -> bool:
    return groups == in_channels == out_channels


def _default_range(depthwise: bool) -> Tuple[float, float]:
    """The range of radii in the authors' code for ImageNet, or for CIFAR-10 and sequences."""
    return (1e-3, 1.) if depthwise else (1e-4, 1.)


class SMPConv2d(_SMPConv):
    """Convolution with an SMP kernel; a drop-in for `nn.Conv2d`.

    (B, C, H, W) → (B, O, H', W'). The positional arguments are those of `nn.Conv2d`.

    A depthwise convolution, groups = in_channels = out_channels, is that of the ImageNet networks: all channels share
    the points. Otherwise it is that of the CIFAR-10 network: each output channel has points of its own, whose weights
    differ between the input channels, and an entry of the kernel is the average over the points that reach it.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: Odd.
        stride: As in `nn.Conv2d`.
        padding: As in `nn.Conv2d`: 0 by default; kernel_size // 2 or 'same' keeps the size at stride 1; 'valid' is 0.
        dilation: Must be 1; an SMP kernel is rendered at any size instead.
        groups: As in `nn.Conv2d`.
        bias: Learn a bias per output channel.
        padding_mode: Must be 'zeros'.
        points: Number of points, by default K * K // 4 if depthwise, else 16 (appendix, 1.1 and 1.2).
        average: See `SMPKernel`; by default unless depthwise.
        radius: See `SMPKernel`.
        coords_std: See `SMPKernel`; by default 0.2 if depthwise, else 0.05.
        radius_range: See `SMPKernel`; by default (1e-3, 1) if depthwise, else (1e-4, 1).

    Raises:
        ValueError: An argument breaks the rules above.

    Example:
        >>> import torch, timm_smpconv
        >>> conv = timm_smpconv.SMPConv2d(8, 8, 31, padding=15, groups=8).eval()
        >>> conv(torch.randn(1, 8, 20, 30)).shape
        torch.Size([1, 8, 20, 30])
        >>> conv.fuse()
        MergedConv2d(8, 8, kernel_size=(31, 31), stride=(1, 1), padding=(15, 15), groups=8, activation=none)
        >>> conv = timm_smpconv.SMPConv2d(3, 8, 33, padding='same').eval()
        >>> conv.fuse()
        MergedLargeConv2d(3, 8, kernel_size=(33, 33), stride=(1, 1), padding=(16, 16))
    """

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: _int_or_pair,
            stride: _int_or_pair = 1,
            padding: Union[str, _int_or_pair] = 0,
            dilation: _int_or_pair = 1,
            groups: int = 1,
            bias: bool = True,
            padding_mode: str = 'zeros',
            *,
            points: Optional[int] = None,
            average: Optional[bool] = None,
            radius: Optional[float] = None,
            coords_std: Optional[float] = None,
            radius_range: Optional[Tuple[float, float]] = None,
            device=None,
            dtype=None,
    ):
        size = _check_odd('kernel_size', kernel_size)
        depthwise = _is_depthwise(in_channels, out_channels, groups)
        if points is None:
            points = max(1, size[0] * size[1] // 4) if depthwise else 16
        if coords_std is None:
            coords_std = 0.2 if depthwise else 0.05
        super().__init__(
            in_channels, out_channels, size, to_2tuple(dilation), groups, bias, padding_mode, points, average,
            radius=radius, coords_std=coords_std, radius_range=radius_range or _default_range(depthwise),
            device=device, dtype=dtype)
        self.stride: Tuple[int, int] = to_2tuple(stride)
        self.padding: Tuple[int, int] = to_2tuple(_check_padding(padding, size, self.stride))
        self.keeps_size = self.stride == (1, 1) and self.padding == (size[0] // 2, size[1] // 2)

    def _check_size(self, kernel_size: Any) -> Tuple[int, ...]:
        return _check_odd('kernel_size', kernel_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_images(x, self.in_channels)
        weight = self.render().to(x.dtype)
        if self.keeps_size and self.depthwise:
            return depthwise_conv2d(x, weight, self.bias)
        if self.keeps_size and self.groups == 1:
            return large_conv2d(x, weight, self.bias)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, groups=self.groups)

    def extra_repr(self) -> str:
        return (
            f'{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, '
            f'padding={self.padding}, groups={self.groups}, bias={self.bias is not None}')


class SMPConv1d(_SMPConv):
    """Convolution of sequences with an SMP kernel, centred or causal; a drop-in for `nn.Conv1d`.

    (B, C, L) → (B, O, L'). The positional arguments are those of `nn.Conv1d`. Points are shared by all channels if the
    convolution is depthwise, see `SMPConv2d`. A causal convolution sees the current and earlier samples only: its
    input is padded with K - 1 zeros in front, and its points start near the current sample.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: K, at least 2; odd unless causal.
        stride: As in `nn.Conv1d`.
        padding: As in `nn.Conv1d`; must be 0 if causal.
        dilation: Must be 1; an SMP kernel is rendered at any size instead.
        groups: As in `nn.Conv1d`.
        bias: Learn a bias per output channel.
        padding_mode: Must be 'zeros'.
        causal: Pad in front only.
        points: Number of points, 30 by default (appendix, 1.1).
        average: See `SMPKernel`; by default unless depthwise.
        radius: See `SMPKernel`.
        coords_std: See `SMPKernel`; 0.2 by default. The paper's 0.1 is that of half the axis.
        radius_range: See `SMPKernel`; by default (1e-3, 1) if depthwise, else (1e-4, 1).

    Raises:
        ValueError: An argument breaks the rules above.

    Example:
        >>> import torch, timm_smpconv
        >>> conv = timm_smpconv.SMPConv1d(3, 8, 1024, causal=True).eval()
        >>> conv(torch.randn(1, 3, 1024)).shape
        torch.Size([1, 8, 1024])
        >>> conv.fuse()
        MergedConv1d(3, 8, kernel_size=(1024,), stride=(1,), causal=True)
    """

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: int,
            stride: int = 1,
            padding: Union[str, int] = 0,
            dilation: int = 1,
            groups: int = 1,
            bias: bool = True,
            padding_mode: str = 'zeros',
            *,
            causal: bool = False,
            points: int = 30,
            average: Optional[bool] = None,
            radius: Optional[float] = None,
            coords_std: float = 0.2,
            radius_range: Optional[Tuple[float, float]] = None,
            device=None,
            dtype=None,
    ):
        k, d, s = _check_length(kernel_size, causal), _single('dilation', dilation), _single('stride', stride)
        if causal and padding != 0:
            raise ValueError(f'padding must be 0 in a causal convolution, which pads in front, got {padding!r}')
        depthwise = _is_depthwise(in_channels, out_channels, groups)
        super().__init__(
            in_channels, out_channels, (k,), (d,), groups, bias, padding_mode, points, average, radius=radius,
            coords_std=coords_std, coords_mean=1. if causal else 0.,
            radius_range=radius_range or _default_range(depthwise), device=device, dtype=dtype)
        if s < 1:
            raise ValueError(f'stride must be at least 1, got {s}')
        self.stride = (s,)
        self.padding = (_single('padding', _check_padding(padding, (k,), self.stride)),)
        if self.padding[0] < 0:
            raise ValueError(f'padding must be at least 0, got {self.padding[0]}')
        self.causal = causal

    def _check_size(self, kernel_size: Any) -> Tuple[int, ...]:
        return (_check_length(kernel_size, self.causal),)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_sequences(x, self.in_channels)
        weight = self.render().to(x.dtype)
        if self.causal:
            low, high = self.kernel.radius_range
            weight = crop_unreached(weight, self.kernel.coords, self.kernel.radius.detach().clamp(low, high))
        return conv1d(x, weight, self.bias, self.stride[0], self.padding[0], self.groups, self.causal)

    def extra_repr(self) -> str:
        return (
            f'{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, '
            f'padding={self.padding}, groups={self.groups}, bias={self.bias is not None}, causal={self.causal}')


folding.WEIGHTS.update({
    DepthwiseConv2d.forward: lambda conv: conv.render(),
    CausalConv1d.forward: lambda conv: conv.weight,
    SMPConv1d.forward: SMPConv1d.render,
    SMPConv2d.forward: SMPConv2d.render,
})


class ConvNorm(nn.Module):
    """A convolution, its BatchNorm and, if given, an activation.

    Merges into a convolution, or into an `nn.Sequential` with the children `conv` and `act`.
    """

    def __init__(
            self,
            conv: Union[nn.Conv1d, nn.Conv2d, SMPConv1d, SMPConv2d],
            act_layer: Optional[Callable[[], nn.Module]] = None,
            device=None,
            dtype=None,
    ):
        super().__init__()
        self.conv = conv
        norm_layer = nn.BatchNorm1d if len(conv.kernel_size) == 1 else nn.BatchNorm2d
        self.bn = norm_layer(conv.out_channels, device=device, dtype=dtype)
        self.act = nn.Identity() if act_layer is None else act_layer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.bn(self.conv(x)))

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        check_mode(self)
        conv = _folded_conv_norm(self, '').build()
        if isinstance(self.act, nn.Identity):
            return conv
        merged = nn.Sequential(OrderedDict(conv=conv, act=deepcopy(self.act)))
        merged.training = False  # the activation keeps its mode
        return merged


class RepConv(CheckedLoading):
    """A large SMP branch and a small convolution branch, each with a BatchNorm, added; merges into one convolution."""

    def __init__(self, large: ConvNorm, small: ConvNorm):
        super().__init__()
        self.large = large
        self.small = small

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.large(x) + self.small(x)

    def check_resize(self, kernel_size: Any, small_scale: Optional[float] = None) -> None:
        """Raise the ValueError that `resize` would raise, if it would."""
        large, small = _conv_of(self.large), _conv_of(self.small)
        if not isinstance(large, _SMPConv):
            raise ValueError(f'the large branch must be an SMP convolution to be resized, got {type(large).__name__}')
        size, _ = large.check_resize(kernel_size)
        if small_scale is not None and not 0 < small_scale < math.inf:
            raise ValueError(f'small_scale must be positive and finite, got {small_scale}')
        if small_scale is not None and isinstance(small, DepthwiseConv2d):
            reach = max(small_scale, 1)
            if any(small_scale * (s // 2) >= k // 2 + reach for k, s in zip(size, small.kernel_size)):
                raise ValueError(
                    f'kernel_size must hold the kernel beside it, {small.kernel_size}, at small_scale = {small_scale}, '
                    f'got {size}')
            return
        least = tuple(getattr(small, 'size', dilated_size(small.kernel_size, small.dilation[0])))
        if any(k < s for k, s in zip(size, least)):
            raise ValueError(f'kernel_size must not be smaller than the kernel beside it, {least}, got {size}')

    def resize(self, kernel_size: Any, small_scale: Optional[float] = None) -> Any:
        """Render the large kernel at another size from now on, see `SMPConv2d.resize`, and resample the small one.

        Args:
            kernel_size: See `SMPConv2d.resize`; not smaller than the small kernel, so that both merge.
            small_scale: Interpolate the depthwise kernel beside it linearly for a map that is this many times as dense
                as in training. Its parameters do not change. By default it stays as it is, and so do dilated kernels
                and those over all channels.

        Returns:
            This module.

        Raises:
            ValueError: kernel_size breaks these rules; nothing is changed.
        """
        self.check_resize(kernel_size, small_scale)
        large, small = _conv_of(self.large), _conv_of(self.small)
        large.resize(kernel_size)
        if small_scale is not None and isinstance(small, DepthwiseConv2d):
            small.rescale(small_scale, large.kernel_size)
        return self

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        check_mode(self)
        return folding.add_small(_folded(self.large, 'large'), _folded(self.small, 'small')).build()


class RepSMPConv2d(RepConv):
    """A large depthwise SMP branch and a small depthwise branch, each with a BatchNorm, added.

    (B, C, H, W) → (B, C, H, W), stride 1. Merges into one `nn.Conv2d`.

    Args:
        channels: C.
        kernel_size: Size of the SMP kernel, odd.
        small_kernel: Size of the kernel beside it, odd, not larger than kernel_size.
        points: See `SMPConv2d`.
        dilation: For a map that is this many times as dense as one for which the sizes are meant. The large kernel has
            no holes: it is rendered at dilation * (kernel_size - 1) + 1 samples, see `SMPConv2d.resize`. The small one
            is dilated.

    Example:
        >>> import torch, timm_smpconv
        >>> layer = timm_smpconv.RepSMPConv2d(8, 31).eval()
        >>> layer(torch.randn(1, 8, 20, 30)).shape
        torch.Size([1, 8, 20, 30])
        >>> layer.fuse()
        MergedConv2d(8, 8, kernel_size=(31, 31), stride=(1, 1), padding=(15, 15), groups=8, activation=none)
    """

    def __init__(
            self,
            channels: int,
            kernel_size: _int_or_pair,
            small_kernel: _int_or_pair = 5,
            points: Optional[int] = None,
            dilation: int = 1,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        large, (kh, kw) = odd_sizes(kernel_size, small_kernel)
        if dilation < 1:
            raise ValueError(f'dilation must be at least 1, got {dilation}')
        conv = SMPConv2d(
            channels, channels, large, padding='same', groups=channels, bias=False, points=points, **dd)
        if dilation == 1:
            small: nn.Conv2d = DepthwiseConv2d(channels, (kh, kw), bias=False, **dd)
        else:
            conv.resize(dilated_size(large, dilation))
            conv.built_size = conv.kernel_size
            small = nn.Conv2d(
                channels, channels, (kh, kw), padding=(dilation * (kh // 2), dilation * (kw // 2)), dilation=dilation,
                groups=channels, bias=False, **dd)
        super().__init__(ConvNorm(conv, **dd), ConvNorm(small, **dd))


class DenseRepSMPConv2d(RepConv):
    """A large SMP branch and a small branch over all channels, each with a BatchNorm, added.

    (B, I, H, W) → (B, O, H, W), stride 1. Merges into a `MergedLargeConv2d`.

    Args:
        in_channels: I.
        out_channels: O.
        kernel_size: Size of the SMP kernel, odd.
        small_kernel: Size of the kernel beside it, odd, not larger than kernel_size.
        bias: Learn a bias in the SMP branch.
        small_bias: Learn a bias in the small branch.
        smp_args: `points`, `radius`, `coords_std` and `radius_range` of `SMPConv2d`.
    """

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: _int_or_pair,
            small_kernel: _int_or_pair = 3,
            bias: bool = False,
            small_bias: bool = False,
            device=None,
            dtype=None,
            **smp_args: Any,
    ):
        dd = {'device': device, 'dtype': dtype}
        large, (kh, kw) = odd_sizes(kernel_size, small_kernel)
        smp_args = {'coords_std': 0.05, **smp_args}
        conv = SMPConv2d(in_channels, out_channels, large, padding='same', bias=bias, average=True, **smp_args, **dd)
        small = nn.Conv2d(in_channels, out_channels, (kh, kw), padding=(kh // 2, kw // 2), bias=small_bias, **dd)
        super().__init__(ConvNorm(conv, **dd), ConvNorm(small, **dd))


class RepSMPConv1d(RepConv):
    """A long and a short causal branch over all channels, each with a BatchNorm, added.

    (B, I, L) → (B, O, L). Merges into a `MergedConv1d`.

    Args:
        in_channels: I.
        out_channels: O.
        kernel_size: Length of the SMP kernel, at least 2.
        small_kernel: Length of the kernel beside it, not longer than kernel_size.
        bias: Learn a bias in the SMP branch.
        smp_args: `points`, `radius`, `coords_std` and `radius_range` of `SMPConv1d`.
    """

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: int,
            small_kernel: int = 5,
            bias: bool = False,
            device=None,
            dtype=None,
            **smp_args: Any,
    ):
        dd = {'device': device, 'dtype': dtype}
        if not 1 <= small_kernel <= kernel_size:
            raise ValueError(
                f'small_kernel must be at least 1 and not larger than kernel_size = {kernel_size}, got {small_kernel}')
        conv = SMPConv1d(in_channels, out_channels, kernel_size, bias=bias, causal=True, average=True, **smp_args, **dd)
        small = CausalConv1d(in_channels, out_channels, small_kernel, bias=False, **dd)
        super().__init__(ConvNorm(conv, **dd), ConvNorm(small, **dd))


def merged_block(
        block: Any,
        act1: nn.Module,
        dwconv: nn.Module,
        act2: nn.Module,
) -> MergedBlock:
    """What a block `x + drop_path(pw2(act2(dwconv(act1(pw1(norm(x)))))))` merges into.

    BatchNorms are folded into the 1×1 convolutions.

    Args:
        block: Has `norm`, `pw1`, `pw2` and `drop_path`.
        act1: Kept as it is if a `MergedConv2d` cannot compute it; `act2` likewise.
        dwconv: Merged if it has a `fuse` method, else kept as it is.
        act2: See `act1`.

    Raises:
        MergeError: One of these cannot be folded exactly.
    """
    check_mode(block)
    if forward_of(block.drop_path) is DropPath.forward:
        check_mode(block.drop_path, 'drop_path')
    elif forward_of(block.drop_path) is not nn.Identity.forward:
        raise refused(block.drop_path, 'drop_path', 'must be a DropPath or an Identity')
    pw1, pw2 = _folded(block.pw1, 'pw1'), _folded(block.pw2, 'pw2')
    if not pw1.is_pointwise():
        raise refused(pw1.like, 'pw1', 'must be a 1×1 convolution with stride 1 and without groups')
    scale, shift = affine(block.norm, 'norm', pw1.weight.shape[1], pw1.weight.device)
    moved = pw1.weight.flatten(1) @ shift  # (O,)
    pw1 = pw1._replace(
        weight=pw1.weight * scale.reshape(1, -1, 1, 1), bias=moved if pw1.bias is None else pw1.bias + moved)
    before, after = pw1.build(), pw2.build()
    dwconv = merge(dwconv, 'dwconv') if hasattr(dwconv, 'fuse') else deepcopy(dwconv)
    merged = MergedBlock(before, absorb(before, act1), dwconv, absorb(dwconv, act2), after)
    merged.training = False  # parts that are kept stay in their mode
    return merged


def odd_sizes(kernel_size: _int_or_pair, small_kernel: _int_or_pair) -> Tuple[Tuple[int, int], Tuple[int, int]]:
    """Both sizes of a `RepSMPConv2d` as pairs; raises a ValueError unless they are odd and the small one fits."""
    large, small = _check_odd('kernel_size', kernel_size), _check_odd('small_kernel', small_kernel)
    if small[0] > large[0] or small[1] > large[1]:
        raise ValueError(f'small_kernel must not be larger than kernel_size = {large}, got {small}')
    return large, small


def _conv_of(branch: nn.Module) -> Any:
    """The convolution in a `ConvNorm`, or one that stands in its place."""
    return getattr(branch, 'conv', branch)


def dilated_size(size: Tuple[int, ...], dilation: int) -> Tuple[int, ...]:
    """The samples that a kernel spans if they lie `dilation` apart."""
    return tuple(dilation * (k - 1) + 1 for k in size)


def _check_odd(name: str, size: _int_or_pair) -> Tuple[int, int]:
    try:
        pair: Tuple[int, ...] = tuple(map(operator.index, to_2tuple(size)))
    except TypeError:
        raise ValueError(f'{name} must be one or two integers, got {size!r}') from None
    if len(pair) != 2 or any(k < 1 or k % 2 == 0 for k in pair):
        raise ValueError(f'{name} must be odd and positive, got {pair}')
    return pair[0], pair[1]


def _check_length(kernel_size: Any, causal: bool) -> int:
    k = _single('kernel_size', kernel_size)
    if k < 2 or (k % 2 == 0 and not causal):
        rule = 'at least 2' if causal else 'odd and at least 3, unless causal'
        raise ValueError(f'kernel_size must be {rule}, got {k}')
    return k


def _check_padding(padding: Any, size: Tuple[int, ...], stride: Tuple[int, ...]) -> Any:
    """Padding as a number or numbers."""
    if not isinstance(padding, str):
        return padding
    if padding not in ('same', 'valid') or (padding == 'same' and set(stride) != {1}):
        raise ValueError(f"padding must be numbers, 'valid' or, at stride 1, 'same', got {padding!r}")
    return tuple(k // 2 for k in size) if padding == 'same' else 0


def _single(name: str, value: Any) -> int:
    """A number, or the number in a sequence of one."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(values) != 1 or not isinstance(values[0], int):
        raise ValueError(f'{name} must be an integer, got {value!r}')
    return values[0]


def _folded(module: Any, path: str) -> Convolution:
    """The convolution that equals a convolution or a `ConvNorm` without activation."""
    if forward_of(module) is not ConvNorm.forward:
        return folding.values(module, path)
    if forward_of(module.act) is not nn.Identity.forward:
        raise refused(module.act, f'{path}.act', 'must be an Identity')
    return _folded_conv_norm(module, f'{path}.')


def _folded_conv_norm(module: ConvNorm, prefix: str) -> Convolution:
    return folding.with_norm(folding.values(module.conv, f'{prefix}conv'), module.bn, f'{prefix}bn')
