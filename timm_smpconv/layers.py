"""The modules around an SMP kernel, and how each merges into plain convolutions.

Shapes: B batch, C channels, H and W height and width, K kernel size.

Every module with a `fuse` method follows timm's protocol (`timm.utils.reparameterize_model`): it returns the module
that takes its place. It needs evaluation mode, leaves itself unchanged, and computes in float64 where the device has
it.
"""
from collections import OrderedDict
from copy import deepcopy
from typing import Callable, Optional, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d, to_2tuple

from .kernel import SMPKernel
from .merged import MergedBlock, MergedConv2d
from .ops import depthwise_conv2d

__all__ = ['ConvNorm', 'DepthwiseConv2d', 'NormClassifierHead', 'RepSMPConv2d', 'SMPConv2d', 'merged_block']

_int_or_pair = Union[int, Tuple[int, int]]


class DepthwiseConv2d(nn.Conv2d):
    """The depthwise `nn.Conv2d` of stride 1 that keeps the size, computed by `depthwise_conv2d`.

    (B, C, H, W) → (B, C, H, W).
    """

    def __init__(self, channels: int, kernel_size: _int_or_pair, bias: bool = True, device=None, dtype=None):
        kernel_size = _check_odd('kernel_size', kernel_size)
        padding = (kernel_size[0] // 2, kernel_size[1] // 2)
        super().__init__(
            channels, channels, kernel_size, padding=padding, groups=channels, bias=bias, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return depthwise_conv2d(x, self.weight, self.bias)


class SMPConv2d(nn.Module):
    """Depthwise convolution with an SMP kernel whose points all channels share; a drop-in for a depthwise `nn.Conv2d`.

    (B, C, H, W) → (B, C, H', W'). The positional arguments are those of `nn.Conv2d`.

    Args:
        in_channels: C.
        out_channels: Must equal in_channels.
        kernel_size: Odd.
        stride: As in `nn.Conv2d`.
        padding: As in `nn.Conv2d`: 0 by default; kernel_size // 2 or 'same' keeps the size at stride 1; 'valid' is 0.
        dilation: Must be 1; an SMP kernel is rendered at any size instead.
        groups: Must equal in_channels, which is the default.
        bias: Learn a bias per channel.
        padding_mode: Must be 'zeros'.
        points: Number of points, K * K // 4 by default.
        radius: See `SMPKernel`.
        coords_std: See `SMPKernel`.
    """

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: _int_or_pair,
            stride: _int_or_pair = 1,
            padding: Union[str, _int_or_pair] = 0,
            dilation: _int_or_pair = 1,
            groups: Optional[int] = None,
            bias: bool = True,
            padding_mode: str = 'zeros',
            *,
            points: Optional[int] = None,
            radius: Optional[float] = None,
            coords_std: float = 0.2,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        groups = in_channels if groups is None else groups
        if out_channels != in_channels:
            raise ValueError(f'out_channels must equal in_channels = {in_channels} (depthwise), got {out_channels}')
        if groups != in_channels:
            raise ValueError(f'groups must equal in_channels = {in_channels} (depthwise), got {groups}')
        if to_2tuple(dilation) != (1, 1):
            raise ValueError(f'dilation must be 1: render a larger kernel_size instead, got {dilation}')
        if padding_mode != 'zeros':
            raise ValueError(f"padding_mode must be 'zeros', got {padding_mode!r}")
        self.in_channels = self.out_channels = self.groups = in_channels
        self.kernel_size = _check_odd('kernel_size', kernel_size)
        self.stride = to_2tuple(stride)
        if isinstance(padding, str):
            if padding not in ('same', 'valid') or (padding == 'same' and self.stride != (1, 1)):
                raise ValueError(f"padding must be numbers, 'valid' or, at stride 1, 'same', got {padding!r}")
            padding = tuple(k // 2 for k in self.kernel_size) if padding == 'same' else 0
        self.padding = to_2tuple(padding)
        self.dilation = (1, 1)
        self.keeps_size = self.stride == (1, 1) and self.padding == tuple(k // 2 for k in self.kernel_size)
        if points is None:
            points = max(1, self.kernel_size[0] * self.kernel_size[1] // 4)
        self.kernel = SMPKernel(in_channels, self.kernel_size, points, radius=radius, coords_std=coords_std, **dd)
        self.bias = nn.Parameter(torch.zeros(in_channels, **dd)) if bias else None

    def render(self) -> torch.Tensor:
        """The weight of the depthwise convolution, (C, 1, K, K), in float32 at least."""
        return self.kernel().transpose(0, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.render().to(x.dtype)
        if self.keeps_size:
            return depthwise_conv2d(x, weight, self.bias)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, groups=self.groups)

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """The same convolution as a plain `nn.Conv2d`."""
        _refuse_training(self)
        return _plain_conv(self, self.render(), self.bias)

    def extra_repr(self) -> str:
        return (
            f'{self.in_channels}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, '
            f'bias={self.bias is not None}')


class ConvNorm(nn.Module):
    """A convolution, its BatchNorm and, if given, an activation; merges into the convolution (and the activation)."""

    def __init__(
            self,
            conv: Union[nn.Conv2d, SMPConv2d],
            act_layer: Optional[Callable[[], nn.Module]] = None,
            device=None,
            dtype=None,
    ):
        super().__init__()
        self.conv = conv
        self.bn = nn.BatchNorm2d(conv.out_channels, device=device, dtype=dtype)
        self.act = nn.Identity() if act_layer is None else act_layer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.bn(self.conv(x)))

    def folded(self) -> Tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of the convolution with the BatchNorm folded in, in the merging precision."""
        weight = self.conv.render() if isinstance(self.conv, SMPConv2d) else self.conv.weight
        scale, shift = _affine(self.bn)
        bias = shift if self.conv.bias is None else _exact(self.conv.bias) * scale + shift
        return _exact(weight) * scale.reshape(-1, 1, 1, 1), bias

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """An `nn.Conv2d`, or an `nn.Sequential` with the children `conv` and `act`."""
        _refuse_training(self)
        conv = _plain_conv(self.conv, *self.folded())
        return conv if isinstance(self.act, nn.Identity) else nn.Sequential(OrderedDict(conv=conv, act=self.act)).eval()


class RepSMPConv2d(nn.Module):
    """A large SMP branch and a small convolution branch, each with a BatchNorm, added; merges into one `nn.Conv2d`.

    (B, C, H, W) → (B, C, H, W), stride 1.

    Args:
        channels: C.
        kernel_size: Size of the SMP kernel, odd.
        small_kernel: Size of the kernel beside it, odd, not larger than kernel_size.
        points: See `SMPConv2d`.
    """

    def __init__(
            self,
            channels: int,
            kernel_size: _int_or_pair,
            small_kernel: _int_or_pair = 5,
            points: Optional[int] = None,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        large, small = _check_odd('kernel_size', kernel_size), _check_odd('small_kernel', small_kernel)
        if small[0] > large[0] or small[1] > large[1]:
            raise ValueError(f'small_kernel must not be larger than kernel_size = {large}, got {small}')
        padding = (large[0] // 2, large[1] // 2)
        conv = SMPConv2d(channels, channels, large, padding=padding, bias=False, points=points, **dd)
        self.large = ConvNorm(conv, **dd)
        self.small = ConvNorm(DepthwiseConv2d(channels, small, bias=False, **dd), **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.large(x) + self.small(x)

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        _refuse_training(self)
        weight, bias = self.large.folded()  # (C, 1, K, K), (C,)
        small_weight, small_bias = self.small.folded()
        dy, dx = [(k - s) // 2 for k, s in zip(weight.shape[2:], small_weight.shape[2:])]
        weight = weight + F.pad(small_weight, (dx, dx, dy, dy))
        return _plain_conv(self.large.conv, weight, bias + small_bias)


class NormClassifierHead(nn.Module):
    """BatchNorm, global pooling, dropout and a linear classifier.

    (B, C, H, W) → (B, num_classes). With num_classes = 0 or `pre_logits`, (B, C). Without pooling the classifier is a
    1×1 convolution and H and W remain.

    Merged, the BatchNorm is folded into `fc` where that is exact: no pooling, or average pooling, which is linear.
    `norm` then is the 1×1 depthwise convolution it equals, frozen, so that features stay what they were before merging.
    """

    def __init__(
            self,
            in_features: int,
            num_classes: int,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        self.in_features = in_features
        self.norm = nn.BatchNorm2d(in_features, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop_rate)
        self.norm_in_fc = False
        self.reset(num_classes, global_pool, device=device, dtype=dtype)

    def reset(self, num_classes: int, global_pool: Optional[str] = None, device=None, dtype=None) -> None:
        """Put in place a new classifier, or none for num_classes = 0, and another pooling ('' for none) if given."""
        if num_classes < 0:
            raise ValueError(f'num_classes must be 0 (no classifier) or more, got {num_classes}')
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
        self.num_features = self.in_features * self.global_pool.feat_mult()
        if num_classes == 0:
            self.fc = nn.Identity()
        else:
            if pool_type:
                self.fc = nn.Linear(self.num_features, num_classes, device=device, dtype=dtype)
            else:
                self.fc = nn.Conv2d(self.num_features, num_classes, 1, device=device, dtype=dtype)
            nn.init.trunc_normal_(self.fc.weight, std=0.02)
            nn.init.zeros_(self.fc.bias)
        self.norm_in_fc = isinstance(self.norm, nn.Conv2d) and self._can_fold_norm()
        self.train(self.training)

    def _can_fold_norm(self) -> bool:
        if self.global_pool.pool_type in ('avg', 'fast', 'fastavg'):
            return isinstance(self.fc, nn.Linear)
        return not self.global_pool.pool_type and isinstance(self.fc, nn.Conv2d)

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        if pre_logits or not self.norm_in_fc:
            x = self.norm(x)
        x = self.drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)

    @torch.no_grad()
    def fuse(self) -> 'NormClassifierHead':
        if not hasattr(self.norm, 'running_var'):  # merged already, or pruned away
            return self
        _refuse_training(self)
        merged = deepcopy(self)
        merged.norm_in_fc = self._can_fold_norm()
        if merged.norm_in_fc:
            weight, bias = _fold_norm_before(self.norm, _exact(self.fc.weight), _exact(self.fc.bias))
            merged.fc.weight = nn.Parameter(weight.to(self.fc.weight.dtype))
            merged.fc.bias = nn.Parameter(bias.to(self.fc.weight.dtype))
        scale, shift = _affine(self.norm)
        depthwise = nn.Conv2d(
            self.in_features, self.in_features, 1, groups=self.in_features,
            device='meta', dtype=self.norm.running_var.dtype)
        merged.norm = _plain_conv(depthwise, scale.reshape(-1, 1, 1, 1), shift).requires_grad_(False)
        return merged.eval()


def merged_block(block: nn.Module, activation: str) -> MergedBlock:
    """What a block `x + drop_path(pw2(… pw1(norm(x))))` merges into, with an activation behind `pw1`."""
    _refuse_training(block)
    dwconv = nn.Identity()
    if hasattr(block, 'dwconv'):
        dwconv = block.dwconv.fuse()
        dwconv.activation = activation
    pw1 = _plain_conv(block.pw1.conv, *_fold_norm_before(block.norm, *block.pw1.folded()), activation)
    return MergedBlock(pw1, dwconv, block.pw2.fuse())


def _check_odd(name: str, size: _int_or_pair) -> Tuple[int, int]:
    size = to_2tuple(size)
    if len(size) != 2 or any(k < 1 or k % 2 == 0 for k in size):
        raise ValueError(f'{name} must be odd and positive, got {size}')
    return tuple(size)


def _refuse_training(module: nn.Module) -> None:
    if module.training:
        raise RuntimeError(
            f'{type(module).__name__} merges in evaluation mode only, got a module in training mode: '
            'call eval() on the model first')


def _exact(x: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    return x if x is None else x.to(torch.float32 if x.device.type == 'mps' else torch.float64)


def _affine(bn: nn.Module) -> Tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift, each (C,), that a BatchNorm applies in evaluation mode, in the merging precision."""
    if bn.running_var is None:
        raise ValueError('a BatchNorm needs running statistics to be merged, got track_running_stats=False')
    scale = (_exact(bn.running_var) + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * _exact(bn.weight)
    shift = -_exact(bn.running_mean) * scale
    return scale, shift if bn.bias is None else shift + _exact(bn.bias)


def _fold_norm_before(
        bn: nn.Module,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Weight (O, I) or (O, I, 1, 1) and bias (O,) of `layer(bn(x))` as one layer; exact where it pads nothing."""
    scale, shift = _affine(bn)
    moved = weight.flatten(1) @ shift
    merged = (weight.flatten(1) * scale).reshape(weight.shape)
    return merged, moved if bias is None else moved + bias


def _plain_conv(
        conv: Union[nn.Conv2d, SMPConv2d],
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        activation: str = 'none',
) -> MergedConv2d:
    """A convolution with the geometry and dtype of `conv`; draws no random numbers."""
    dtype = (conv.kernel if isinstance(conv, SMPConv2d) else conv).weight.dtype
    plain = MergedConv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
        bias is not None, activation)
    plain.weight = nn.Parameter(weight.detach().to(dtype))
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(dtype))
    return plain
