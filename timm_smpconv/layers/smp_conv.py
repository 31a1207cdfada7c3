"""The convolutions with an SMP kernel, and how each merges into a plain convolution.

Shapes: B batch, C channels, H and W height and width, L length, K kernel size, O and I output and input channels.

`fuse()` follows timm's protocol (`timm.utils.reparameterize_model`): it returns the module that takes the module's
place and leaves the module itself unchanged. In either mode it folds what the module computes in evaluation mode. It
raises `MergeError` for a part that it cannot fold exactly, such as one with a `forward` of its own.
"""
from typing import TYPE_CHECKING, Any, Optional, Tuple, Union

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import to_2tuple

from ..ops import depthwise_conv2d, large_conv2d
from ..ops.render import crop_unreached
from ._checks import check_images, check_length, check_odd, check_padding, check_sequences, single
from ._folding import values
from .merged import _conv1d
from .smp_kernel import SMPKernel

__all__ = ['SMPConv1d', 'SMPConv2d']

_int_or_pair = Union[int, Tuple[int, int]]

for _name in ('check_images', 'check_sequences', 'crop_unreached'):  # FX wraps a function in one module at a time
    torch.fx.wrap(_name)


class _SMPConv(nn.Module):
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
        self.trained_size = kernel_size  # to which the `scale` of `resize_kernels` refers
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
        size, trained = self._check_size(kernel_size), tuple(self.kernel.trained_size)
        if any((k == 1) != (n == 1) for k, n in zip(size, trained)):
            raise ValueError(
                f'kernel_size must be at least 3 on each axis, and 1 where it was built with 1 sample, got {size} for '
                f'a kernel of {trained}')
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
              (kernel): SMPKernel(8, size=(61, 61), points=240, groups=1, average=False, trained_size=(31, 31))
            )
        """
        size, padding = self.check_resize(kernel_size)
        self.kernel.resize(size)
        self.kernel_size, self.padding = size, padding
        return self

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """The same convolution as a plain module."""
        return values(self, (SMPConv1d, SMPConv2d), '').build()


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
        size = check_odd('kernel_size', kernel_size)
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
        self.padding: Tuple[int, int] = to_2tuple(check_padding(padding, size, self.stride))
        self.keeps_size = self.stride == (1, 1) and self.padding == (size[0] // 2, size[1] // 2)

    def _check_size(self, kernel_size: Any) -> Tuple[int, ...]:
        return check_odd('kernel_size', kernel_size)

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
        k, d, s = check_length(kernel_size, causal), single('dilation', dilation), single('stride', stride)
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
        self.padding = (single('padding', check_padding(padding, (k,), self.stride)),)
        if self.padding[0] < 0:
            raise ValueError(f'padding must be at least 0, got {self.padding[0]}')
        self.causal = causal

    def _check_size(self, kernel_size: Any) -> Tuple[int, ...]:
        return (check_length(kernel_size, self.causal),)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_sequences(x, self.in_channels)
        weight = self.render().to(x.dtype)
        if self.causal:
            low, high = self.kernel.radius_range
            weight = crop_unreached(weight, self.kernel.coords, self.kernel.radius.detach().clamp(low, high))
        return _conv1d(x, weight, self.bias, self.stride[0], self.padding[0], self.groups, self.causal)

    def extra_repr(self) -> str:
        return (
            f'{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, '
            f'padding={self.padding}, groups={self.groups}, bias={self.bias is not None}, causal={self.causal}')
