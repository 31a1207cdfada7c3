"""The sequence networks: temporal convolutional networks whose causal kernels are as long as the sequence.

Sources: the paper's appendix 1.1 and Table 1, and `smp/models/cktcn.py` and the commands in `smp/README.md` of the
authors' code (MIT), https://github.com/sangnekim/SMPConv. Written anew for timm.

Shapes: B batch, C channels, L length, H and W height and width of an image that is read row by row, L = H * W.
"""
from functools import partial
from typing import TYPE_CHECKING, Any, Dict, Optional, Tuple

import numpy as np
import torch
import torch.fx
import torch.nn as nn
from timm.models import generate_default_cfgs, register_model

from ..layers._checks import forward_of
from ..layers._folding import merge_parts
from ..layers.heads import ClassifierHead, SelectSequencePool
from ..layers.merged import MergedConv1d, causal_padding, plain_convolution
from ..layers.rep_conv import RepSMPConv1d
from ..weights.hub import AUTHORS
from ._base import SMPNet, build, model_cfg

__all__ = ['SMPTCN']


@torch.fx.wrap
def read_sequences(x: torch.Tensor, longest: int, exact: bool) -> torch.Tensor:
    """Sequences, (B, C, L), as they are, and images, (B, C, H, W), row by row.

    One node in an FX graph.

    Raises:
        ValueError: The shape is another, or L is not from 1 to `longest`, or with `exact` not `longest`.
        TypeError: x is not a floating point tensor.
    """
    if torch.jit.is_tracing():
        return x.flatten(2)
    if not torch.jit.is_scripting() and not isinstance(x, torch.Tensor):
        raise TypeError(f'x must be a tensor of shape (B, C, L) or (B, C, H, W), got {type(x).__name__}')
    if x.ndim not in (3, 4):
        raise ValueError(f'x must be (B, C, L) or (B, C, H, W), got shape {list(x.shape)}')
    shape = list(x.shape)
    x = x.flatten(2)
    if exact and x.shape[2] != longest:
        raise ValueError(f'x must have seq_len = {longest} samples, which the network permutes, got shape {shape}')
    if not 1 <= x.shape[2] <= longest:
        raise ValueError(f'x must have from 1 to seq_len = {longest} samples, got shape {shape}')
    if not x.is_floating_point():
        raise TypeError(f'x must be floating point, got {x.dtype}')
    return x


class SequenceStem(nn.Module):
    """The check of the network's input, its permutation, and dropout; (B, in_chans, L or H, W) → (B, in_chans, L).

    Attributes:
        kernel_length: The length with which the kernels were built, in a merged network that of the kernels; in the
            state dict: the shapes of points do not tell it.
        permutation: (seq_len,), None if nothing is permuted: sample n of the result is sample `permutation[n]` of the
            input.
    """
    kernel_length: torch.Tensor
    permutation: Optional[torch.Tensor]

    def __init__(
            self,
            seq_len: int,
            kernel_length: int,
            permuted: bool,
            input_drop_rate: float,
            device=None,
    ):
        super().__init__()
        self.seq_len = seq_len
        self.trained_length = kernel_length
        self.built_seq_len = seq_len
        self.kernel_length_now = kernel_length
        self.register_buffer('kernel_length', torch.empty([], dtype=torch.long, device=device))
        permutation = torch.empty(seq_len, dtype=torch.long, device=device) if permuted else None
        self.register_buffer('permutation', permutation)
        self.drop = nn.Dropout(input_drop_rate)
        self.reset_parameters()

    @torch.jit.ignore
    def initial_buffers(self) -> Dict[str, torch.Tensor]:
        """The values of the buffers. The permutation is the authors': the first draw after `np.random.seed(0)`."""
        found = {'kernel_length': torch.tensor(self.trained_length, device='cpu')}
        if self.permutation is not None:
            found['permutation'] = torch.tensor(
                np.random.RandomState(0).permutation(self.seq_len).tolist(), device='cpu')
        return found

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Set the buffers, after `to_empty()` for one."""
        for name, value in self.initial_buffers().items():
            getattr(self, name).copy_(value)

    def resize(self, kernel_length: int) -> None:
        """Take sequences that are as many times as long as when the network was built as its kernels are from now on.

        Args:
            kernel_length: That at which the kernels are rendered.
        """
        self.kernel_length_now = kernel_length
        longer = (kernel_length - 1) / (self.trained_length - 1)
        self.seq_len = max(round(self.built_seq_len * longer), kernel_length)

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Become the stem of a network with merged kernels, whose length is the one at which they are rendered."""
        self.trained_length = self.kernel_length_now
        self.kernel_length.fill_(self.kernel_length_now)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = read_sequences(x, self.seq_len, self.permutation is not None)
        permutation = self.permutation
        if permutation is not None:
            x = x[:, :, permutation]
        return self.drop(x)


class TCNBlock(nn.Module):
    """`relu(drop(relu(conv2(drop(relu(conv1(x)))))) + shortcut(x))`, (B, in_dim, L) → (B, dim, L)."""

    def __init__(self, conv1: nn.Module, conv2: nn.Module, shortcut: nn.Module, drop_rate: float):
        super().__init__()
        self.pad1: nn.Module = nn.Identity()  # `to_plain` takes the padding out of the convolutions
        self.conv1 = conv1
        self.act1 = nn.ReLU(inplace=True)
        self.drop1 = nn.Dropout(drop_rate)
        self.pad2: nn.Module = nn.Identity()
        self.conv2 = conv2
        self.act2 = nn.ReLU(inplace=True)
        self.drop2 = nn.Dropout(drop_rate)
        self.shortcut = shortcut
        self.act3 = nn.ReLU(inplace=True)

    def reparameterize(self) -> None:
        """Merge all parts in place, or none."""
        merge_parts(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.drop1(self.act1(self.conv1(self.pad1(x))))
        y = self.drop2(self.act2(self.conv2(self.pad2(y))))
        return self.act3(y + self.shortcut(x))

    def to_plain(self) -> nn.Module:
        """Take the padding out of merged convolutions, in place, so that their names in the state dict stay the same.

        Returns:
            This block.
        """
        for pad, conv in (('pad1', 'conv1'), ('pad2', 'conv2')):
            merged = getattr(self, conv)
            if forward_of(merged) is MergedConv1d.forward and merged.causal:
                setattr(self, pad, causal_padding(merged))
                setattr(self, conv, plain_convolution(merged))
        return self


class SMPTCN(SMPNet):
    """(B, in_chans, L) → (B, num_classes); images (B, in_chans, H, W) are read row by row.

    Sequences may be shorter than the kernels, whose last entry multiplies the current sample; entries for samples
    before the first multiply padding.

    Args:
        seq_len: The longest sequence.
        global_pool: 'last' for the features of the last sample, 'avg' or 'max'; '' for those of all samples.
        depth: Blocks, each of two convolutions.
        dim: Channels of the blocks.
        kernel_size: Length of the kernels, at least 2; seq_len by default.
        small_kernel: Length of the kernels beside them.
        points: Points of each output channel's kernels.
        conv_bias: Learn a bias in the SMP convolutions.
        radius: Initial radius of the points, 2 / K by default (appendix, 1.1). The registered models have that of the
            authors' code, unless seq_len or kernel_size is given.
        radius_range: Smallest and largest radius. The authors' code has (1e-4, 1), the appendix (1e-4, 0.1).
        drop_rate: Dropout within the blocks.
        input_drop_rate: Dropout of the input.
        permuted: Permute the samples of sequences of exactly seq_len samples by a fixed permutation, in the state dict
            as `stem.permutation`.
        inference_mode: Build the merged architecture, into which a merged checkpoint loads.

    Raises:
        ValueError: An argument breaks the rules above.

    Example:
        >>> import torch
        >>> net = SMPTCN(in_chans=3, num_classes=4, seq_len=100, depth=2)
        >>> net.eval()(torch.randn(1, 3, 100)).shape
        torch.Size([1, 4])
    """
    input_weights = (
        'blocks.0.conv1.large.conv.kernel.weight', 'blocks.0.conv1.small.conv.weight', 'blocks.0.conv1.weight',
        'blocks.0.shortcut.weight')
    output_fmt = 'NCL'
    if TYPE_CHECKING:  # TorchScript would read it
        stem: Any

    def __init__(
            self,
            in_chans: int = 1,
            num_classes: int = 10,
            seq_len: int = 784,
            global_pool: str = 'last',
            depth: int = 6,
            dim: int = 30,
            kernel_size: Optional[int] = None,
            small_kernel: int = 5,
            points: int = 30,
            conv_bias: bool = False,
            radius: Optional[float] = None,
            radius_range: Tuple[float, float] = (1e-4, 1.),
            drop_rate: float = 0.,
            input_drop_rate: float = 0.,
            permuted: bool = False,
            inference_mode: bool = False,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        for name, value in (('in_chans', in_chans), ('seq_len', seq_len), ('depth', depth), ('dim', dim)):
            if value < 1:
                raise ValueError(f'{name} must be at least 1, got {value}')
        length = seq_len if kernel_size is None else kernel_size
        if not 2 <= length <= seq_len:
            raise ValueError(
                f'kernel_size must be at least 2 and at most seq_len = {seq_len}, which is its default, got {length}')
        for name, rate in (('drop_rate', drop_rate), ('input_drop_rate', input_drop_rate)):
            if not 0 <= rate < 1:
                raise ValueError(f'{name} must be at least 0 and below 1, got {rate}')
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.num_features = dim

        def conv(in_dim: int) -> nn.Module:
            if inference_mode:
                return MergedConv1d(in_dim, dim, length, causal=True, **dd)
            return RepSMPConv1d(
                in_dim, dim, length, small_kernel, conv_bias, points=points, radius=radius, radius_range=radius_range,
                **dd)

        self.stem = SequenceStem(seq_len, length, permuted, input_drop_rate, device)
        self.blocks = nn.Sequential(*[
            TCNBlock(
                conv(in_dim), conv(dim), nn.Identity() if in_dim == dim else nn.Conv1d(in_dim, dim, 1, **dd),
                drop_rate)
            for in_dim in (in_chans, *[dim] * (depth - 1))
        ])
        self.feature_info = [dict(num_chs=dim, reduction=1, module=f'blocks.{i}') for i in range(depth)]
        self.head = ClassifierHead(
            dim, num_classes, global_pool, select_pool=SelectSequencePool,
            init_weight=partial(nn.init.normal_, std=0.01), **dd)
        self.head_hidden_size = self.head.num_features

    @property
    def seq_len(self) -> int:
        """The longest sequence; `resize_kernels` changes it."""
        return self.stem.seq_len

    @property
    def kernel_length(self) -> int:
        """Length of the kernels that a checkpoint of this network has."""
        return self.stem.trained_length

    @torch.jit.ignore
    def authors_buffers(self) -> Dict[str, torch.Tensor]:
        stem: Any = self.stem
        return {f'stem.{name}': value for name, value in stem.initial_buffers().items()}


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return model_cfg(**{
        'url': AUTHORS, 'num_classes': 10, 'pool_size': None, 'crop_pct': 1., 'interpolation': 'bilinear',
        'first_conv': (), **kwargs})


_mnist: Dict[str, Any] = dict(input_size=(1, 28, 28), mean=(0.1307,), std=(0.3081,))

# A sequence counts as an image of one row. Series are normalized by their data set, see sequences/.
default_cfgs = generate_default_cfgs({
    'smpconv_tcn_smnist.mnist': _cfg(**_mnist),
    'smpconv_tcn_pmnist.mnist': _cfg(**_mnist),
    'smpconv_tcn_scifar10.cifar10': _cfg(input_size=(3, 32, 32)),
    'smpconv_tcn_ct.character_trajectories': _cfg(
        input_size=(3, 1, 182), num_classes=20, mean=(0.,) * 3, std=(1.,) * 3),
    'smpconv_tcn_sc.speech_commands': _cfg(input_size=(20, 1, 161), mean=(0.,) * 20, std=(1.,) * 20),
    'smpconv_tcn_scraw.speech_commands': _cfg(input_size=(1, 1, 16000), mean=(0.,), std=(1.,)),
})


def _create_smp_tcn(variant: str, pretrained: bool, kwargs: Dict[str, Any], **model_args: Any) -> SMPTCN:
    args = {**model_args, **kwargs}
    if (args['seq_len'], args.get('kernel_size')) != (model_args['seq_len'], None) and 'radius' not in kwargs:
        del args['radius']  # in a kernel of another length it may reach no sample
    return build(SMPTCN, variant, pretrained, range(args.get('depth', 6)), **args)


@register_model
def smpconv_tcn_smnist(pretrained: bool = False, **kwargs: Any) -> SMPTCN:
    """Sequential MNIST, one pixel at a time: 99.75 % as published."""
    return _create_smp_tcn(
        'smpconv_tcn_smnist', pretrained, kwargs, in_chans=1, seq_len=784, radius=0.002, input_drop_rate=0.1)


@register_model
def smpconv_tcn_pmnist(pretrained: bool = False, **kwargs: Any) -> SMPTCN:
    """Permuted sequential MNIST: 99.10 % as published."""
    return _create_smp_tcn(
        'smpconv_tcn_pmnist', pretrained, kwargs, in_chans=1, seq_len=784, radius=0.002, input_drop_rate=0.1,
        permuted=True)


@register_model
def smpconv_tcn_scifar10(pretrained: bool = False, **kwargs: Any) -> SMPTCN:
    """Sequential CIFAR-10: 84.86 % as published."""
    return _create_smp_tcn(
        'smpconv_tcn_scifar10', pretrained, kwargs, in_chans=3, seq_len=1024, radius=0.002, conv_bias=True)


@register_model
def smpconv_tcn_ct(pretrained: bool = False, **kwargs: Any) -> SMPTCN:
    """Character Trajectories: 99.53 % as published."""
    return _create_smp_tcn(
        'smpconv_tcn_ct', pretrained, kwargs, in_chans=3, num_classes=20, seq_len=182, radius=0.012, conv_bias=True)


@register_model
def smpconv_tcn_sc(pretrained: bool = False, **kwargs: Any) -> SMPTCN:
    """Speech Commands as MFCC: 97.71 % as published."""
    return _create_smp_tcn(
        'smpconv_tcn_sc', pretrained, kwargs, in_chans=20, seq_len=161, radius=0.012, conv_bias=True, drop_rate=0.2)


@register_model
def smpconv_tcn_scraw(pretrained: bool = False, **kwargs: Any) -> SMPTCN:
    """Speech Commands as raw samples: 94.95 % as published."""
    return _create_smp_tcn(
        'smpconv_tcn_scraw', pretrained, kwargs, in_chans=1, seq_len=16000, radius=0.0002, drop_rate=0.1)
