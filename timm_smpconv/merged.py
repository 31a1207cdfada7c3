"""What layers and blocks merge into, and the rules of merging.

Shapes: B batch, C channels, H and W height and width, L length, K kernel size.
"""
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Dict, Generator, Optional, Tuple, Union, cast

import torch
import torch.nn as nn
import torch.nn.functional as F

from .ops import (
    ACTIVATIONS,
    Kept,
    causal_conv1d,
    conv2d_in_steps,
    fused_conv2d,
    large_conv2d,
    measure_dense,
    measure_fused,
)

__all__ = [
    'MergeError', 'MergedBlock', 'MergedConv1d', 'MergedConv2d', 'MergedLargeConv2d', 'MergedNorm', 'check_mode',
    'conv1d', 'merge', 'merge_parts', 'merging_in_training_mode', 'prepack', 'reset_convolution']

_int_or_pair = Union[int, Tuple[int, int]]
_training_is_allowed: ContextVar[bool] = ContextVar('_training_is_allowed', default=False)


class MergeError(RuntimeError):
    """A module cannot be merged exactly.

    Args:
        module: The class of the module.
        reason: The rule it breaks and the value received.
        path: Name of the module within the one that was to be merged.
    """

    def __init__(self, module: str, reason: str, path: str = ''):
        super().__init__(module, reason, path)
        self.module = module
        self.reason = reason
        self.path = path

    def __str__(self) -> str:
        return f'{self.path or self.module} {self.reason}'


@contextmanager
def merging_in_training_mode() -> Generator[None, None, None]:
    """Let `fuse()` accept modules in training mode, in this thread or task.

    Merging folds the running statistics in either mode. It normally raises in training mode, because a module then
    computes with the statistics of the batch. timm's scripts merge before they call `eval()`.

    Example:
        >>> import timm, timm_smpconv
        >>> model = timm.create_model('smpconv_mobile31', device='meta')
        >>> with timm_smpconv.merged.merging_in_training_mode():
        ...     merged = timm.utils.reparameterize_model(model).eval()
    """
    token = _training_is_allowed.set(True)
    try:
        yield
    finally:
        _training_is_allowed.reset(token)


def check_mode(module: nn.Module, path: str = '') -> None:
    """Raise `MergeError` if `module` is in training mode, outside `merging_in_training_mode`."""
    if module.training and not _training_is_allowed.get():
        raise MergeError(
            type(module).__name__,
            'merges in evaluation mode only, got a module in training mode: call eval() on the model first', path)


def merge(module: Any, path: str) -> nn.Module:
    """`module.fuse()`; errors name the module by its path."""
    try:
        return module.fuse()
    except MergeError as error:
        raise MergeError(error.module, error.reason, f'{path}.{error.path}'.rstrip('.')) from None


def merge_parts(module: nn.Module, skip: str = '') -> None:
    """Replace every part of `module` that has a `fuse` method by what that returns: all parts, or none if one raises.

    `timm.utils.reparameterize_model` replaces one part after the other, and goes on into those it has replaced.

    Args:
        module: It is changed in place.
        skip: Name of a child that is left alone.

    Raises:
        MergeError: A part cannot be merged.
    """
    merged = []

    def visit(parent: nn.Module, prefix: str) -> None:
        for name, child in parent.named_children():
            if prefix + name == skip:
                continue
            if hasattr(child, 'fuse'):
                merged.append((parent, name, merge(child, prefix + name)))
            else:
                visit(child, f'{prefix}{name}.')

    visit(module, '')
    for parent, name, part in merged:
        setattr(parent, name, part)


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


def conv1d(
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
            return conv1d(
                x, self.weight, self.bias, self.stride[0], self.padding[0], self.groups, self.causal)
        return conv1d(
            x, self.weight, self.bias, self.stride[0], self.padding[0], self.groups, self.causal, self.kept)

    def measure(self, x: torch.Tensor) -> None:
        """Let `kept` hold the fastest way to compute such inputs."""
        k, padding = self.kernel_size[0], self.padding[0]
        if self.stride[0] == 1 and (self.causal or (padding == k // 2 and k % 2 == 1)):  # as in `conv1d`
            x = x if self.causal else F.pad(x, [0, k // 2])
            measure_dense(cast(Kept, self.kept), x, self.weight, self.bias, self.groups)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, causal={self.causal}'


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


def prepack(model: nn.Module, images: Optional[torch.Tensor] = None) -> nn.Module:
    """Freeze a merged model and let it cache what its convolutions derive from their weights.

    The weights in oneDNN's format, on CPUs with AVX2 or AVX-512, and the transforms of large kernels where they are
    convolved by FFT. Without prepacking they are derived again in every forward pass. A cached copy is made in the
    first pass without gradients, and again when the size of the input or the weights change. Changes that PyTorch does
    not count (in place through `.data` or NumPy, or by another process) go unnoticed: prepack again. The copies take as
    much memory as the weights, or several times as much for transforms. Weights that require gradients again are not
    cached, and weights in oneDNN's format are not where `fused_conv2d` does not compute in one pass.

    With `images`, every convolution times on a CPU all the ways to compute it for inputs such as theirs, and takes the
    fastest from then on. That takes about 20 forward passes. Inputs of another size, dtype, memory format or number of
    threads are computed as without `images`. Call it again with other images to measure those as well.

    Args:
        model: Merged by `timm.utils.reparameterize_model`, or holding such models. It is changed in place.
        images: What the model is called with, (B, C, H, W) of its dtype and memory format.

    Returns:
        The model, its parameters without `requires_grad`.

    Raises:
        ValueError: The model contains no merged convolution, or is in training mode and has images to measure.

    Example:
        >>> import timm, timm_smpconv
        >>> model = timm.create_model('smpconv_mobile31', inference_mode=True).eval()
        >>> model = timm_smpconv.prepack(model, torch.randn(1, 3, 64, 64))
    """
    merged = [m for m in model.modules() if isinstance(m, (MergedConv2d, MergedConv1d, MergedLargeConv2d))]
    if not merged:
        raise ValueError(
            f'model must be merged (timm.utils.reparameterize_model), got {type(model).__name__} without a merged '
            'convolution')
    if images is not None and model.training:
        raise ValueError('model must be in evaluation mode to be measured with images: call eval() first')
    model.requires_grad_(False)
    for module in merged:
        if module.kept is None or images is None:
            module.kept = Kept()
    if images is not None:
        with torch.no_grad():
            hooks = [module.register_forward_pre_hook(_measure, with_kwargs=True) for module in merged]
            try:
                model(images)
            finally:
                for hook in hooks:
                    hook.remove()
    return model


def _measure(module: Any, args: Tuple[torch.Tensor, ...], kwargs: Dict[str, torch.Tensor]) -> None:
    """A forward pre-hook: time the ways to compute this convolution, and remember the fastest."""
    module.measure(*args, **kwargs)
