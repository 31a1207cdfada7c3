"""The modules around an SMP kernel, and how each merges into plain convolutions.

Shapes: B batch, C channels, H and W height and width, K kernel size, O and I output and input channels.

`fuse()` follows timm's protocol (`timm.utils.reparameterize_model`): it returns the module that takes the module's
place and leaves the module itself unchanged. It computes in float64 where the device supports that. It raises
`MergeError` in training mode, and for a part that it cannot fold exactly: one with a `forward` of its own, say.
"""
from collections import OrderedDict
from copy import deepcopy
from typing import Any, Callable, NamedTuple, Optional, Tuple, Union

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import (
    BatchNormAct2d,
    DropPath,
    FrozenBatchNormAct2d,
    SelectAdaptivePool2d,
    SyncBatchNormAct,
    to_2tuple,
)
from torchvision.ops import FrozenBatchNorm2d  # type: ignore[import-untyped]  # torchvision carries no type hints

from .kernel import SMPKernel
from .merged import MergedBlock, MergedConv2d, MergedNorm, MergeError, check_mode, merge
from .ops import depthwise_conv2d

__all__ = [
    'ConvNorm', 'DepthwiseConv2d', 'NormClassifierHead', 'RepSMPConv2d', 'SMPConv2d', 'check_images', 'merged_block',
    'odd_sizes']

_int_or_pair = Union[int, Tuple[int, int]]


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


class DepthwiseConv2d(nn.Conv2d):
    """The depthwise `nn.Conv2d` of stride 1 that keeps the size, computed by `depthwise_conv2d`.

    (B, C, H, W) → (B, C, H, W).
    """

    def __init__(self, channels: int, kernel_size: _int_or_pair, bias: bool = True, device=None, dtype=None):
        size = _check_odd('kernel_size', kernel_size)
        padding = (size[0] // 2, size[1] // 2)
        super().__init__(
            channels, channels, size, padding=padding, groups=channels, bias=bias, device=device, dtype=dtype)

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

    Example:
        >>> import torch, timm_smpconv
        >>> conv = timm_smpconv.SMPConv2d(8, 8, 31, padding=15).eval()  # for nn.Conv2d(8, 8, 31, padding=15, groups=8)
        >>> conv(torch.randn(1, 8, 20, 30)).shape
        torch.Size([1, 8, 20, 30])
        >>> conv.fuse()
        MergedConv2d(8, 8, kernel_size=(31, 31), stride=(1, 1), padding=(15, 15), groups=8, activation=none)
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
        self.stride: Tuple[int, int] = to_2tuple(stride)
        same = (self.kernel_size[0] // 2, self.kernel_size[1] // 2)
        if isinstance(padding, str):
            if padding not in ('same', 'valid') or (padding == 'same' and self.stride != (1, 1)):
                raise ValueError(f"padding must be numbers, 'valid' or, at stride 1, 'same', got {padding!r}")
            padding = same if padding == 'same' else 0
        self.padding: Tuple[int, int] = to_2tuple(padding)
        self.dilation = (1, 1)
        self.keeps_size = self.stride == (1, 1) and self.padding == same
        if points is None:
            points = max(1, self.kernel_size[0] * self.kernel_size[1] // 4)
        self.kernel = SMPKernel(in_channels, self.kernel_size, points, radius=radius, coords_std=coords_std, **dd)
        self.bias = nn.Parameter(torch.zeros(in_channels, **dd)) if bias else None

    def render(self) -> torch.Tensor:
        """The weight of the depthwise convolution, (C, 1, K, K), in float32 at least."""
        return self.kernel().transpose(0, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_images(x, self.in_channels)
        weight = self.render().to(x.dtype)
        if self.keeps_size:
            return depthwise_conv2d(x, weight, self.bias)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, groups=self.groups)

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """The same convolution as a plain `nn.Conv2d`."""
        check_mode(self)
        return _values(self, '').build()

    def extra_repr(self) -> str:
        return (
            f'{self.in_channels}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, '
            f'bias={self.bias is not None}')


class ConvNorm(nn.Module):
    """A convolution, its BatchNorm and, if given, an activation.

    Merges into an `nn.Conv2d`, or into an `nn.Sequential` with the children `conv` and `act`.
    """

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

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        check_mode(self)
        conv = _folded_conv_norm(self, '').build()
        if isinstance(self.act, nn.Identity):
            return conv
        merged = nn.Sequential(OrderedDict(conv=conv, act=deepcopy(self.act)))
        merged.training = False  # the activation keeps its mode
        return merged


class RepSMPConv2d(nn.Module):
    """A large SMP branch and a small convolution branch, each with a BatchNorm, added; merges into one `nn.Conv2d`.

    (B, C, H, W) → (B, C, H, W), stride 1.

    Args:
        channels: C.
        kernel_size: Size of the SMP kernel, odd.
        small_kernel: Size of the kernel beside it, odd, not larger than kernel_size.
        points: See `SMPConv2d`.

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
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        large, small = odd_sizes(kernel_size, small_kernel)
        padding = (large[0] // 2, large[1] // 2)
        conv = SMPConv2d(channels, channels, large, padding=padding, bias=False, points=points, **dd)
        self.large = ConvNorm(conv, **dd)
        self.small = ConvNorm(DepthwiseConv2d(channels, small, bias=False, **dd), **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.large(x) + self.small(x)

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        check_mode(self)
        large, small = _folded(self.large, 'large'), _folded(self.small, 'small')
        for name, branch in (('large', large), ('small', small)):
            if not branch.is_same_depthwise():
                raise _refused(branch.like, name, 'must be a depthwise convolution that keeps the size')
        dy, dx = [(k - s) // 2 for k, s in zip(large.weight.shape[2:], small.weight.shape[2:])]
        if dy < 0 or dx < 0:
            raise _refused(small.like, 'small', 'must not be larger than the large branch')
        weight = large.weight + F.pad(small.weight, (dx, dx, dy, dy))
        bias = large.bias if small.bias is None else small.bias if large.bias is None else large.bias + small.bias
        return large._replace(weight=weight, bias=bias).build()


class NormClassifierHead(nn.Module):
    """BatchNorm, global pooling, dropout and a linear classifier.

    (B, C, H, W) → (B, num_classes). With num_classes = 0 or `pre_logits`, (B, C). Without pooling the classifier is a
    1×1 convolution, and H and W remain.

    In the merged head a 1×1 depthwise convolution takes the BatchNorm's place. It is not folded into `fc`, so that
    `get_classifier`, `forward_head(pre_logits=True)` and an assigned `fc` mean the same before and after merging.

    Args:
        in_features: C.
        inference_mode: Build the merged head.
    """

    def __init__(
            self,
            in_features: int,
            num_classes: int,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            inference_mode: bool = False,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.in_features = in_features
        if inference_mode:
            conv = MergedConv2d(in_features, in_features, 1, groups=in_features, **dd)
            nn.init.ones_(conv.weight)
            self.norm: nn.Module = MergedNorm(conv).train()
        else:
            self.norm = nn.BatchNorm2d(in_features, **dd)
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, global_pool, **dd)

    def reset(self, num_classes: int, global_pool: Optional[str] = None, device=None, dtype=None) -> None:
        """Replace the classifier by a new one, or none for num_classes = 0, and the pooling if given ('' for none)."""
        if num_classes < 0:
            raise ValueError(f'num_classes must be 0 (no classifier) or more, got {num_classes}')
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool: SelectAdaptivePool2d = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
        self.num_features = self.in_features * self.global_pool.feat_mult()
        self.fc: nn.Module = nn.Identity()
        if num_classes > 0:
            dd = {'device': device, 'dtype': dtype}
            if pool_type:
                fc: Union[nn.Linear, nn.Conv2d] = nn.Linear(self.num_features, num_classes, **dd)
            else:
                fc = nn.Conv2d(self.num_features, num_classes, 1, **dd)
            nn.init.trunc_normal_(fc.weight, std=0.02)
            if fc.bias is not None:
                nn.init.zeros_(fc.bias)
            self.fc = fc
        self.train(self.training)

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.drop(self.global_pool(self.norm(x)))
        return x if pre_logits else self.fc(x)

    @torch.no_grad()
    def fuse(self) -> 'NormClassifierHead':
        if isinstance(self.norm, (MergedNorm, nn.Identity)):  # merged or pruned already
            return self
        check_mode(self)
        norm: Any = self.norm
        scale, shift = _affine(norm, 'norm', self.in_features)
        like = nn.Conv2d(
            self.in_features, self.in_features, 1, groups=self.in_features,
            device='meta', dtype=norm.running_var.dtype)
        merged = deepcopy(self)
        merged.norm = MergedNorm(_Convolution(like, scale.reshape(-1, 1, 1, 1), shift).build())
        return merged


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
    if _forward_of(block.drop_path) is DropPath.forward:
        check_mode(block.drop_path, 'drop_path')
    elif _forward_of(block.drop_path) is not nn.Identity.forward:
        raise _refused(block.drop_path, 'drop_path', 'must be a DropPath or an Identity')
    pw1, pw2 = _folded(block.pw1, 'pw1'), _folded(block.pw2, 'pw2')
    if not pw1.is_pointwise():
        raise _refused(pw1.like, 'pw1', 'must be a 1×1 convolution with stride 1 and without groups')
    scale, shift = _affine(block.norm, 'norm', pw1.weight.shape[1], pw1.weight.device)
    moved = pw1.weight.flatten(1) @ shift  # (O,)
    pw1 = pw1._replace(
        weight=pw1.weight * scale.reshape(1, -1, 1, 1), bias=moved if pw1.bias is None else pw1.bias + moved)
    before, after = pw1.build(), pw2.build()
    dwconv = merge(dwconv, 'dwconv') if hasattr(dwconv, 'fuse') else deepcopy(dwconv)
    merged = MergedBlock(before, _absorb(before, act1), dwconv, _absorb(dwconv, act2), after)
    merged.training = False  # parts that are kept stay in their mode
    return merged


def odd_sizes(kernel_size: _int_or_pair, small_kernel: _int_or_pair) -> Tuple[Tuple[int, int], Tuple[int, int]]:
    """Both sizes of a `RepSMPConv2d` as pairs; raises a ValueError unless they are odd and the small one fits."""
    large, small = _check_odd('kernel_size', kernel_size), _check_odd('small_kernel', small_kernel)
    if small[0] > large[0] or small[1] > large[1]:
        raise ValueError(f'small_kernel must not be larger than kernel_size = {large}, got {small}')
    return large, small


def _check_odd(name: str, size: _int_or_pair) -> Tuple[int, int]:
    pair: Tuple[int, ...] = tuple(to_2tuple(size))
    if len(pair) != 2 or any(k < 1 or k % 2 == 0 for k in pair):
        raise ValueError(f'{name} must be odd and positive, got {pair}')
    return pair[0], pair[1]


# Merging. A module is known by the `forward` that it runs: subclasses, and modules to which another forward was
# assigned, may compute something else.
_CONV_FORWARDS = (nn.Conv2d.forward, DepthwiseConv2d.forward, MergedConv2d.forward)
_NORM_FORWARDS = (
    nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward, BatchNormAct2d.forward, SyncBatchNormAct.forward)
_FROZEN_NORM_FORWARDS = (FrozenBatchNorm2d.forward, FrozenBatchNormAct2d.forward)  # the same in training mode


def _forward_of(module: nn.Module) -> Any:
    return getattr(module.forward, '__func__', None)


def _refused(module: nn.Module, path: str, rule: str) -> MergeError:
    kind = type(module).__name__
    return MergeError(kind, f'{rule} to be merged, got {kind}({module.extra_repr()})', path)


class _Convolution(NamedTuple):
    """Values in the merging precision of a convolution with the geometry and dtype of `like`."""
    like: Union[nn.Conv2d, SMPConv2d]
    weight: torch.Tensor  # (O, I / groups, K, K)
    bias: Optional[torch.Tensor]  # (O,)

    def is_pointwise(self) -> bool:
        like = self.like
        return self.weight.shape[2:] == (1, 1) and tuple(like.padding) == (0, 0) and like.stride == (1, 1) and (
            like.groups == 1)

    def is_same_depthwise(self) -> bool:
        like = self.like
        channels, inputs, k, l = self.weight.shape
        return like.groups == channels and inputs == 1 and tuple(like.padding) == (k // 2, l // 2) and (
            k % 2 == l % 2 == 1 and like.stride == like.dilation == (1, 1))

    def build(self) -> MergedConv2d:
        """The convolution in evaluation mode; draws no random numbers."""
        like: Any = self.like
        dtype = (like.kernel if isinstance(like, SMPConv2d) else like).weight.dtype
        conv = MergedConv2d(
            like.in_channels, like.out_channels, like.kernel_size, like.stride, like.padding, like.dilation,
            like.groups, self.bias is not None, device='meta', dtype=dtype)
        conv.weight = nn.Parameter(self.weight.detach().to(dtype))
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias.detach().to(dtype))
        conv.training = False
        return conv


def _values(conv: Any, path: str) -> _Convolution:
    bias = None if getattr(conv, 'bias', None) is None else _exact(conv.bias)
    if _forward_of(conv) is SMPConv2d.forward:
        return _Convolution(conv, _exact(conv.render()), bias)
    plain = _forward_of(conv) in _CONV_FORWARDS and conv.padding_mode == 'zeros' and not isinstance(conv.padding, str)
    if not plain or getattr(conv, 'activation', 'none') != 'none':
        raise _refused(conv, path, 'must be an SMPConv2d or an nn.Conv2d padded with zeros')
    return _Convolution(conv, _exact(conv.weight), bias)


def _folded(module: Any, path: str) -> _Convolution:
    """The convolution that equals a convolution or a `ConvNorm` without activation."""
    if _forward_of(module) is not ConvNorm.forward:
        return _values(module, path)
    if _forward_of(module.act) is not nn.Identity.forward:
        raise _refused(module.act, f'{path}.act', 'must be an Identity')
    return _folded_conv_norm(module, f'{path}.')


def _folded_conv_norm(module: ConvNorm, prefix: str) -> _Convolution:
    conv = _values(module.conv, f'{prefix}conv')
    scale, shift = _affine(module.bn, f'{prefix}bn', len(conv.weight), conv.weight.device)
    return conv._replace(
        weight=conv.weight * scale.reshape(-1, 1, 1, 1), bias=shift if conv.bias is None else conv.bias * scale + shift)


def _affine(
        norm: Any,
        path: str,
        channels: int,
        device: Optional[torch.device] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift, (C,) each, that a BatchNorm applies in evaluation mode, in the merging precision."""
    if _forward_of(norm) is nn.Identity.forward:
        return _exact(torch.ones(channels, device=device)), _exact(torch.zeros(channels, device=device))
    if _forward_of(norm) not in _NORM_FORWARDS + _FROZEN_NORM_FORWARDS:
        raise _refused(norm, path, 'must be a BatchNorm2d or an Identity')
    for name in ('drop', 'act'):
        part = getattr(norm, name, None)
        if part is not None and _forward_of(part) is not nn.Identity.forward:
            raise _refused(part, f'{path}.{name}', 'must be an Identity')
    if norm.running_var is None:
        raise _refused(norm, path, 'must have running statistics')
    if _forward_of(norm) in _NORM_FORWARDS:
        check_mode(norm, path)
    scale = (_exact(norm.running_var) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * _exact(norm.weight)
    shift = -_exact(norm.running_mean) * scale
    return scale, shift if norm.bias is None else shift + _exact(norm.bias)


def _absorb(module: nn.Module, act: nn.Module) -> nn.Module:
    """Let a `MergedConv2d` compute `act` if it can; returns the activation that is left to do."""
    activation = None
    if _forward_of(act) is nn.ReLU.forward:
        activation = 'relu'
    elif isinstance(act, nn.GELU) and _forward_of(act) is nn.GELU.forward and act.approximate == 'none':
        activation = 'gelu'
    if activation is None or not isinstance(module, MergedConv2d) or module.activation != 'none':
        return deepcopy(act)
    module.activation = activation
    return nn.Identity().eval()


def _exact(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float32 if x.device.type == 'mps' else torch.float64)
