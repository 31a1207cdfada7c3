"""A convolution with its BatchNorm, a large and a small one added, and how these and blocks of them merge.

Shapes: B batch, C channels, H and W height and width, L length, K kernel size, O and I output and input channels.

`fuse()` follows timm's protocol, see `smp_conv`.
"""
import math
from collections import OrderedDict
from copy import deepcopy
from typing import Any, Callable, Optional, Tuple, Union

import torch
import torch.nn as nn
from timm.layers import DropPath

from . import _folding
from ._checks import odd_sizes
from ._folding import Convolution, absorb, added_to, affine, check_forward, forward_of, merge, refused
from .merged import MergedBlock, MergedConv1d, MergedConv2d, MergedLargeConv2d
from .small_conv import CausalConv1d, DepthwiseConv2d
from .smp_conv import SMPConv1d, SMPConv2d, _SMPConv

__all__ = [
    'ConvNorm', 'DenseRepSMPConv2d', 'RepConv', 'RepSMPConv1d', 'RepSMPConv2d', 'dilated_size', 'merged_block']

_int_or_pair = Union[int, Tuple[int, int]]
_CONVOLUTIONS = (  # that merging folds
    SMPConv1d, SMPConv2d, CausalConv1d, DepthwiseConv2d, nn.Conv1d, nn.Conv2d, MergedConv1d, MergedConv2d,
    MergedLargeConv2d)


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
        conv = _folded_conv_norm(self, '').build()
        if isinstance(self.act, nn.Identity) and not added_to(self.act):
            return conv
        merged = nn.Sequential(OrderedDict(conv=conv, act=deepcopy(self.act)))
        merged.training = False  # the activation keeps its mode
        return merged


class RepConv(nn.Module):
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
        check_forward(self, '', RepConv)
        return _folding.add_small(_folded(self.large, 'large'), _folded(self.small, 'small')).build()


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
            conv.trained_size = conv.kernel_size
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
    check_forward(block.drop_path, 'drop_path', DropPath, nn.Identity)
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


def _conv_of(branch: nn.Module) -> Any:
    """The convolution in a `ConvNorm`, or one that stands in its place."""
    return getattr(branch, 'conv', branch)


def dilated_size(size: Tuple[int, ...], dilation: int) -> Tuple[int, ...]:
    """The samples that a kernel spans if they lie `dilation` apart."""
    return tuple(dilation * (k - 1) + 1 for k in size)


def _folded(module: Any, path: str) -> Convolution:
    """The convolution that equals a convolution or a `ConvNorm` without activation."""
    if forward_of(module) is not ConvNorm.forward:
        return _folding.values(module, _CONVOLUTIONS, path)
    check_forward(module.act, f'{path}.act', nn.Identity)
    return _folded_conv_norm(module, f'{path}.')


def _folded_conv_norm(module: ConvNorm, prefix: str) -> Convolution:
    check_forward(module, prefix.rstrip('.'), ConvNorm)
    conv = _folding.values(module.conv, _CONVOLUTIONS, f'{prefix}conv')
    return _folding.with_norm(conv, module.bn, f'{prefix}bn')
