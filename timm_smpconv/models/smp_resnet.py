"""The CIFAR-10 network: a ResNet whose convolutions are large SMP kernels over all channels.

Sources: the paper's appendix 1.1 and Table 1, and `smp/models/ckresnet.py` of the authors' code (MIT),
https://github.com/sangnekim/SMPConv. Written anew for timm.

Shapes: B batch, C channels, H and W height and width.
"""
from typing import Any, Optional, Sequence, Tuple

import torch
import torch.fx
import torch.nn as nn
from timm.models import generate_default_cfgs, register_model

from ..layers._checks import check_images, input_channels
from ..layers._folding import merge_parts
from ..layers.heads import ClassifierHead
from ..layers.merged import MergedLargeConv2d, reset_convolution
from ..layers.rep_conv import DenseRepSMPConv2d
from ..weights.hub import AUTHORS
from ._base import SMPNet, build, model_cfg

__all__ = ['SMPResNet']

torch.fx.wrap('check_images')  # FX wraps a function in one module at a time


class ResNetStem(nn.Module):
    """The check of the network's input, dropout, a large kernel and ReLU; (B, in_chans, H, W) → (B, dim, H, W)."""

    def __init__(self, input_drop_rate: float, conv1: nn.Module):
        super().__init__()
        self.drop = nn.Dropout(input_drop_rate)
        self.conv1 = conv1
        self.act = nn.ReLU(inplace=True)

    def reparameterize(self) -> None:
        """Merge all parts in place, or none."""
        merge_parts(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            check_images(x, 0)
        else:
            check_images(x, input_channels(self))
        return self.act(self.conv1(self.drop(x)))


class ResNetBlock(nn.Module):
    """`relu(conv2(drop(relu(conv1(x)))) + shortcut(x))`, (B, in_dim, H, W) → (B, dim, H, W)."""

    def __init__(self, conv1: nn.Module, conv2: nn.Module, shortcut: nn.Module, drop_rate: float):
        super().__init__()
        self.conv1 = conv1
        self.act1 = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(drop_rate)
        self.conv2 = conv2
        self.shortcut = shortcut
        self.act2 = nn.ReLU(inplace=True)

    def reparameterize(self) -> None:
        """Merge all parts in place, or none."""
        merge_parts(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv2(self.drop(self.act1(self.conv1(x))))
        return self.act2(y + self.shortcut(x))


class SMPResNet(SMPNet):
    """(B, in_chans, H, W) → (B, num_classes), for images of any size.

    Args:
        dims: Channels of each block. The stem has as many as the first.
        kernel_size: Size of the large kernels, odd.
        small_kernel: Size of the kernels beside the large ones, odd.
        points: Points of each output channel's kernels.
        conv_bias: Learn a bias in the SMP convolutions.
        radius: Initial radius of the points. The authors' code has 0.12, the appendix (2 / K) * 2 = 0.121.
        radius_range: Smallest and largest radius. The authors' code has (1e-4, 1). The appendix has (1e-4, 0.1), which
            would exclude the initial radius.
        drop_rate: Dropout within the blocks.
        input_drop_rate: Dropout of the input.
        inference_mode: Build the merged architecture, into which a merged checkpoint loads.

    Raises:
        ValueError: An argument breaks the rules above.

    Example:
        >>> import torch
        >>> net = SMPResNet(num_classes=4, dims=(8, 12), kernel_size=9)
        >>> net.eval()(torch.randn(1, 3, 16, 20)).shape
        torch.Size([1, 4])
    """
    input_weights = (
        'stem.conv1.large.conv.kernel.weight', 'stem.conv1.small.conv.weight', 'stem.conv1.weight')

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 10,
            global_pool: str = 'avg',
            dims: Sequence[int] = (24, 24, 36, 36, 36, 48, 48),
            kernel_size: int = 33,
            small_kernel: int = 3,
            points: int = 16,
            conv_bias: bool = False,
            radius: Optional[float] = 0.12,
            radius_range: Tuple[float, float] = (1e-4, 1.),
            drop_rate: float = 0.1,
            input_drop_rate: float = 0.,
            inference_mode: bool = False,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if in_chans < 1:
            raise ValueError(f'in_chans must be at least 1, got {in_chans}')
        if not isinstance(dims, Sequence) or len(dims) < 1 or min(dims) < 1:
            raise ValueError(f'dims must be integers, one for each block, all at least 1, got {dims}')
        for name, rate in (('drop_rate', drop_rate), ('input_drop_rate', input_drop_rate)):
            if not 0 <= rate < 1:
                raise ValueError(f'{name} must be at least 0 and below 1, got {rate}')
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.num_features = dims[-1]
        self.kernel_length = kernel_size

        def conv(in_dim: int, dim: int, small_bias: bool = False) -> nn.Module:
            if inference_mode:
                return MergedLargeConv2d(in_dim, dim, kernel_size, **dd)
            return DenseRepSMPConv2d(
                in_dim, dim, kernel_size, small_kernel, conv_bias, small_bias, points=points, radius=radius,
                radius_range=radius_range, **dd)

        self.stem = ResNetStem(input_drop_rate, conv(in_chans, dims[0], small_bias=True))
        self.blocks = nn.Sequential(*[
            ResNetBlock(
                conv(in_dim, dim), conv(dim, dim),
                nn.Identity() if in_dim == dim else nn.Conv2d(in_dim, dim, 1, **dd), drop_rate)
            for in_dim, dim in zip((dims[0], *dims), dims)
        ])
        self.feature_info = [dict(num_chs=dim, reduction=1, module=f'blocks.{i}') for i, dim in enumerate(dims)]
        self.head = ClassifierHead(
            dims[-1], num_classes, global_pool, init_weight=nn.init.kaiming_normal_, **dd)
        self.head_hidden_size = self.head.num_features
        self.stem.apply(_init_weights)
        self.blocks.apply(_init_weights)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        reset_convolution(module)


default_cfgs = generate_default_cfgs({
    'smpconv_resnet_cifar10.cifar10': model_cfg(
        url=AUTHORS, num_classes=10, input_size=(3, 32, 32), pool_size=(32, 32), crop_pct=1., first_conv=()),
})


@register_model
def smpconv_resnet_cifar10(pretrained: bool = False, **kwargs: Any) -> SMPResNet:
    """The CIFAR-10 network, kernels of 33×33: 93.00 % top-1 as published."""
    dims = kwargs.get('dims', (24, 24, 36, 36, 36, 48, 48))
    last = [i for i, dim in enumerate(dims) if dim not in dims[i + 1:i + 2]]  # of the blocks of each width
    return build(SMPResNet, 'smpconv_resnet_cifar10', pretrained, last, **kwargs)
