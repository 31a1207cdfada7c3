"""SMPConv: RepLKNet's architecture with large kernels made of self-moving points.

Paper: `SMPConv: Self-moving Point Representations for Continuous Convolution`
    - https://arxiv.org/abs/2304.02330 (CVPR 2023)

Sources: the paper's appendix 1.2 and 2.1, and `smp_imagenet/models/SMPConv.py` of the authors' code (MIT),
https://github.com/sangnekim/SMPConv. Written anew for timm.

Shapes: B batch, C channels, H and W height and width.
"""
from collections import OrderedDict
from functools import partial
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple, cast

import torch
import torch.nn as nn
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model

from ..layers._checks import check_images, input_channels, odd_sizes
from ..layers._folding import check_forward, merge_parts
from ..layers.heads import NormClassifierHead
from ..layers.merged import MergedBlock, MergedConv2d
from ..layers.rep_conv import ConvNorm, RepSMPConv2d, dilated_size, merged_block
from ..layers.small_conv import DepthwiseConv2d
from ..weights.hub import AUTHORS
from ._base import SMPNet, build, checkpoint_blocks, model_cfg

__all__ = ['SMPConvNet']

torch.fx.wrap('check_images')  # FX wraps a function in one module at a time


class SMPBlock(nn.Module):
    """BatchNorm, 1×1 convolution, large kernel, 1×1 convolution, each after its norm; (B, C, H, W) → (B, C, H, W)."""

    def __init__(
            self,
            dim: int,
            kernel_size: int,
            small_kernel: int = 5,
            points: Optional[int] = None,
            drop_path: float = 0.,
            dilation: int = 1,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.pw1 = ConvNorm(nn.Conv2d(dim, dim, 1, bias=False, **dd), **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.dwconv = RepSMPConv2d(dim, kernel_size, small_kernel, points, dilation, **dd)
        self.act2 = nn.ReLU(inplace=True)
        self.pw2 = ConvNorm(nn.Conv2d(dim, dim, 1, bias=False, **dd), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act1(self.pw1(self.norm(x)))
        y = self.pw2(self.act2(self.dwconv(y)))
        return x + self.drop_path(y)

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """The `MergedBlock` that computes the same."""
        check_forward(self, '', SMPBlock)
        return merged_block(self, self.act1, self.dwconv, self.act2)

    @staticmethod
    def build_merged(
            dim: int,
            kernel_size: int,
            small_kernel: int = 5,
            dilation: int = 1,
            device=None,
            dtype=None,
    ) -> MergedBlock:
        """What a new block merges into, with start values of its own."""
        dd = {'device': device, 'dtype': dtype}
        size: Any = dilated_size(odd_sizes(kernel_size, small_kernel)[0], dilation)
        padding = (size[0] // 2, size[1] // 2)
        return MergedBlock(
            MergedConv2d(dim, dim, 1, activation='relu', **dd),
            nn.Identity(),
            MergedConv2d(dim, dim, size, padding=padding, groups=dim, activation='relu', **dd),
            nn.Identity(),
            MergedConv2d(dim, dim, 1, **dd),
        )


class FeedForward(nn.Module):
    """BatchNorm, 1×1 convolution, GELU, 1×1 convolution, each after its norm; (B, C, H, W) → (B, C, H, W)."""

    def __init__(self, dim: int, hidden_dim: int, drop_path: float = 0., device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.pw1 = ConvNorm(nn.Conv2d(dim, hidden_dim, 1, bias=False, **dd), **dd)
        self.act = nn.GELU()
        self.pw2 = ConvNorm(nn.Conv2d(hidden_dim, dim, 1, bias=False, **dd), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.pw2(self.act(self.pw1(self.norm(x))))
        return x + self.drop_path(y)

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """The `MergedBlock` that computes the same."""
        check_forward(self, '', FeedForward)
        return merged_block(self, self.act, nn.Identity().eval(), nn.Identity().eval())

    @staticmethod
    def build_merged(dim: int, hidden_dim: int, device=None, dtype=None) -> MergedBlock:
        """What a new block merges into, with start values of its own."""
        dd = {'device': device, 'dtype': dtype}
        return MergedBlock(
            MergedConv2d(dim, hidden_dim, 1, activation='gelu', **dd),
            nn.Identity(),
            nn.Identity(),
            nn.Identity(),
            MergedConv2d(hidden_dim, dim, 1, **dd),
        )


class SMPStem(nn.ModuleList):
    """The check of the network's input, and layers that follow each other."""

    def reparameterize(self) -> None:
        """Merge all parts in place, or none."""
        merge_parts(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            check_images(x, 0, 32)
        else:
            check_images(x, input_channels(self), 32)
        for layer in self:
            x = layer(x)
        return x


class SMPStage(nn.Module):
    """Downsampling by `stride` (except in the first stage), then pairs of an SMP block and a feed-forward block.

    (B, in_dim, H, W) → (B, dim, ceil(H / stride), ceil(W / stride)), or (B, dim, H, W) in the first stage.

    Args:
        dilation: How many times as dense as for the network's usual strides the map in front of the stage is, and the
            one in the stage.
    """

    def __init__(
            self,
            in_dim: Optional[int],
            dim: int,
            kernel_size: int,
            small_kernel: int,
            points: int,
            mlp_ratio: float,
            drop_path: Sequence[float],
            inference_mode: bool = False,
            stride: int = 2,
            dilation: Tuple[int, int] = (1, 1),
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.grad_checkpointing = False
        before, within = dilation
        self.downsample = nn.Identity() if in_dim is None else nn.Sequential(
            _conv_norm_relu(in_dim, dim, 1, inference_mode=inference_mode, **dd),
            _conv_norm_relu(
                dim, dim, 3, stride, groups=dim, dilation=before, inference_mode=inference_mode, **dd),
        )
        hidden_dim = int(dim * mlp_ratio)
        blocks: List[nn.Module] = []
        for rate in drop_path:
            if inference_mode:
                blocks += [
                    SMPBlock.build_merged(dim, kernel_size, small_kernel, within, **dd),
                    FeedForward.build_merged(dim, hidden_dim, **dd),
                ]
            else:
                blocks += [
                    SMPBlock(dim, kernel_size, small_kernel, points, rate, within, **dd),
                    FeedForward(dim, hidden_dim, rate, **dd),
                ]
        self.blocks = nn.Sequential(*blocks)

    def reparameterize(self) -> None:
        """Merge all parts in place, or none."""
        merge_parts(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_blocks(self.blocks, x)
        return self.blocks(x)


class SMPConvNet(SMPNet):
    """(B, in_chans, H, W) with H, W at least 32 → (B, num_classes).

    Args:
        depths: Pairs of blocks in each stage.
        dims: Channels of each stage. The stem has as many as the first.
        kernel_sizes: Size of each stage's large kernels, odd.
        small_kernel: Size of the kernels beside the large ones, odd.
        points: Points of each stage's kernels, at least 1; K * K // points_divisor by default.
        points_divisor: 4 in tiny and base, 8 in the mobile models.
        mlp_ratio: Expansion of the feed-forward blocks.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth in [0, 1), rising linearly from 0 over the pairs of blocks.
        output_stride: 32, or 16 or 8 for the denser maps of DeepLab: stages behind it do not downsample; their large
            kernels are rendered on the denser grid and their small ones dilated. Weights of any output stride fit.
        inference_mode: Build the merged architecture, into which a merged checkpoint loads.

    Raises:
        ValueError: An argument breaks the rules above.

    Example:
        >>> import torch
        >>> net = SMPConvNet(dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), kernel_sizes=(9, 7, 7, 5), num_classes=10)
        >>> net.eval()(torch.randn(1, 3, 64, 96)).shape
        torch.Size([1, 10])
    """
    levels = 'stages'
    input_weights = ('stem.0.conv.weight',)

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            depths: Sequence[int] = (2, 2, 8, 2),
            dims: Sequence[int] = (96, 192, 384, 768),
            kernel_sizes: Sequence[int] = (31, 29, 27, 13),
            small_kernel: int = 5,
            points: Optional[Sequence[int]] = None,
            points_divisor: int = 4,
            mlp_ratio: float = 4.,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            output_stride: int = 32,
            inference_mode: bool = False,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        _check_stages(depths=depths, dims=dims, kernel_sizes=kernel_sizes)
        if points is None:
            if points_divisor < 1 or min(kernel_sizes) ** 2 < points_divisor:
                raise ValueError(
                    f'points_divisor must be at least 1 and leave a point in every kernel, got {points_divisor}')
            points = [k * k // points_divisor for k in kernel_sizes]
        _check_stages(points=points)
        if int(min(dims) * mlp_ratio) < 1:
            raise ValueError(f'mlp_ratio must leave a hidden channel in every stage, got {mlp_ratio}')
        if in_chans < 1:
            raise ValueError(f'in_chans must be at least 1, got {in_chans}')
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate must be at least 0 and below 1, got {drop_path_rate}')
        if output_stride not in (8, 16, 32):
            raise ValueError(f'output_stride must be 8, 16 or 32, got {output_stride}')
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.num_features = dims[-1]

        layer = partial(_conv_norm_relu, inference_mode=inference_mode, device=device, dtype=dtype)
        self.stem = SMPStem([
            layer(in_chans, dims[0], 3, stride=2),
            layer(dims[0], dims[0], 3, groups=dims[0]),
            layer(dims[0], dims[0], 1),
            layer(dims[0], dims[0], 3, stride=2, groups=dims[0]),
        ])  # (B, in_chans, H, W) → (B, dims[0], H / 4, W / 4)
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)  # a list for each stage
        reductions = [min(4 * 2 ** i, output_stride) for i in range(4)]
        dilations = [4 * 2 ** i // reduction for i, reduction in enumerate(reductions)]
        self.stages = nn.Sequential(*[
            SMPStage(
                dims[i - 1] if i else None, dims[i], kernel_sizes[i], small_kernel, points[i], mlp_ratio, rates[i],
                inference_mode, reductions[i] // reductions[max(i - 1, 0)], (dilations[max(i - 1, 0)], dilations[i]),
                **dd)
            for i in range(4)
        ])
        self.feature_info = [
            dict(num_chs=dims[i], reduction=reductions[i], module=f'stages.{i}') for i in range(4)]
        self.head = NormClassifierHead(dims[-1], num_classes, global_pool, drop_rate, inference_mode, **dd)
        self.head_hidden_size = self.head.num_features
        if not inference_mode:
            self.apply(_init_weights)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        return dict(
            stem=r'^stem',
            blocks=r'^stages\.(\d+)' if coarse else [
                (r'^stages\.(\d+)\.downsample', (0,)),
                (r'^stages\.(\d+)\.blocks\.(\d+)', None),
                (r'^head\.norm', (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in cast('Iterable[SMPStage]', self.stages):
            stage.grad_checkpointing = enable

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) → (B, num_features, H / output_stride, W / output_stride), before the head's norm."""
        return self.stages(self.stem(x))


def _conv_norm_relu(
        in_chs: int,
        out_chs: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        dilation: int = 1,
        inference_mode: bool = False,
        device=None,
        dtype=None,
) -> nn.Module:
    """A `ConvNorm` with ReLU, or what it merges into."""
    dd = {'device': device, 'dtype': dtype}
    padding = dilation * (kernel_size // 2)
    if inference_mode:
        merged = MergedConv2d(in_chs, out_chs, kernel_size, stride, padding, dilation, groups, **dd)
        return nn.Sequential(OrderedDict(conv=merged, act=nn.ReLU(inplace=True)))
    conv: nn.Conv2d
    if groups == in_chs == out_chs and stride == dilation == 1:
        conv = DepthwiseConv2d(in_chs, kernel_size, bias=False, **dd)
    else:
        conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride, padding, dilation, groups, bias=False, **dd)
    return ConvNorm(conv, partial(nn.ReLU, inplace=True), **dd)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)


def _check_stages(**per_stage: Sequence[int]) -> None:
    for name, values in per_stage.items():
        if not isinstance(values, Sequence) or len(values) != 4 or min(values) < 1:
            raise ValueError(f'{name} must be four integers, one for each stage, all at least 1, got {values}')


default_cfgs = generate_default_cfgs({
    'smpconv_tiny.in1k': model_cfg(url=AUTHORS),
    'smpconv_base.in1k': model_cfg(url=AUTHORS),
    'smpconv_mobile31.in1k': model_cfg(),  # of which the authors published no weights
    'smpconv_mobile51.in1k': model_cfg(),
})


def _create_smpconv(variant: str, pretrained: bool = False, **kwargs: Any) -> SMPConvNet:
    return build(SMPConvNet, variant, pretrained, (0, 1, 2, 3), **kwargs)


@register_model
def smpconv_tiny(pretrained: bool = False, **kwargs: Any) -> SMPConvNet:
    """SMPConv-T: 82.5 % top-1 on ImageNet-1k as published."""
    model_args = dict(depths=(2, 2, 8, 2), dims=(96, 192, 384, 768), drop_path_rate=0.1)
    return _create_smpconv('smpconv_tiny', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def smpconv_base(pretrained: bool = False, **kwargs: Any) -> SMPConvNet:
    """SMPConv-B: 83.8 % top-1 on ImageNet-1k as published."""
    model_args = dict(depths=(2, 2, 20, 2), dims=(128, 256, 512, 1024), drop_path_rate=0.5)
    return _create_smpconv('smpconv_base', pretrained=pretrained, **dict(model_args, **kwargs))


_mobile_args = dict(depths=(2, 2, 2, 2), dims=(64, 128, 256, 320), points_divisor=8, mlp_ratio=2.)


@register_model
def smpconv_mobile31(pretrained: bool = False, **kwargs: Any) -> SMPConvNet:
    """SMPConv-mobile with kernels up to 31: 73.5 % top-1 on ImageNet-1k as published."""
    model_args = dict(_mobile_args, kernel_sizes=(31, 29, 27, 13))
    return _create_smpconv('smpconv_mobile31', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def smpconv_mobile51(pretrained: bool = False, **kwargs: Any) -> SMPConvNet:
    """SMPConv-mobile with kernels up to 51: 73.7 % top-1 on ImageNet-1k as published."""
    model_args = dict(_mobile_args, kernel_sizes=(51, 49, 47, 13))
    return _create_smpconv('smpconv_mobile51', pretrained=pretrained, **dict(model_args, **kwargs))
