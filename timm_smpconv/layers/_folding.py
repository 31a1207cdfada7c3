"""The rules of merging, and the arithmetic: convolutions, the BatchNorms behind or in front of them, and activations.

Shapes: C channels, K kernel size, O and I output and input channels. A kernel has one or two axes.

Everything is computed in float64 where the device supports that. A module is recognised by its `forward` method, not by
its class: a subclass that overrides it, an instance to which another one was assigned, or one with forward hooks may
compute something else and is refused with a `MergeError`. Kernels are rendered by a call, with their hooks, and
parametrizations compute the parameters that are read. Merging folds what a module computes in evaluation mode, whatever
its mode is.
"""
from copy import deepcopy
from typing import Any, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct
from torch.nn.utils.parametrize import is_parametrized
from torchvision.ops import FrozenBatchNorm2d  # type: ignore[import-untyped]  # torchvision carries no type hints

from .._errors import DataError
from ._checks import added_to, forward_of
from .merged import MergedConv1d, MergedConv2d, MergedLargeConv2d

__all__ = [
    'Convolution', 'MergeError', 'absorb', 'add_small', 'added_to', 'affine', 'check_forward', 'exact', 'forward_of',
    'merge', 'merge_parts', 'refused', 'values', 'with_norm']

_NORM_FORWARDS = (  # BatchNorm1d and BatchNorm2d have the same one
    nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward, BatchNormAct2d.forward, SyncBatchNormAct.forward,
    FrozenBatchNorm2d.forward, FrozenBatchNormAct2d.forward)


class MergeError(DataError):
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


def merge(module: Any, path: str) -> nn.Module:
    """`module.fuse()`; errors name the module by its path."""
    try:
        return module.fuse()
    except MergeError as error:
        raise MergeError(error.module, error.reason, f'{path}.{error.path}'.rstrip('.')) from None


def merge_parts(module: nn.Module) -> None:
    """Replace every part of a module that has a method `fuse` by what that returns: all parts, or none if one raises.

    Stages and blocks call it in `reparameterize`, which `timm.utils.reparameterize_model` prefers to replacing the
    parts itself. Where that replaces a part it also goes on into the part that was replaced, merges what is in there
    and drops it: kernels would be rendered up to three times.

    Args:
        module: It is changed in place.

    Raises:
        MergeError: A part cannot be merged.
    """
    merged = []

    def visit(parent: nn.Module, prefix: str) -> None:
        for name, child in parent.named_children():
            if hasattr(child, 'fuse'):
                merged.append((parent, name, merge(child, prefix + name)))
            else:
                visit(child, f'{prefix}{name}.')

    visit(module, '')
    for parent, name, part in merged:
        setattr(parent, name, part)


def refused(module: nn.Module, path: str, rule: str) -> MergeError:
    """The error for a part that breaks a rule of merging."""
    kind, room = type(module).__name__, type(module).__module__
    if not room.startswith(('torch.', 'timm')):  # an adapter's class may be another Conv2d
        kind = f'{room}.{kind}'
    return MergeError(kind, f'{rule} to be merged, got {kind}({module.extra_repr()})', path)


def check_added(module: nn.Module, path: str) -> None:
    """Raise a `MergeError` if calls of a part compute more than its `forward`."""
    kind, added = type(module).__name__, added_to(module)
    if added:
        raise MergeError(kind, f'must compute what its class does to be merged, got {kind} with {added}', path)


def check_forward(module: nn.Module, path: str, *kinds: Any) -> None:
    """Raise a `MergeError` unless calls of a part compute what `forward` of one of these classes does."""
    check_added(module, path)
    if forward_of(module) not in [kind.forward for kind in kinds]:
        names = ' or '.join(f'{"an" if kind.__name__[0] in "AEIOU" else "a"} {kind.__name__}' for kind in kinds)
        raise refused(module, path, f'must be {names}')


class Convolution(NamedTuple):
    """Values in the merging precision of a convolution with the geometry and dtype of `like`."""
    like: Any
    weight: torch.Tensor  # (O, I / groups, *K)
    bias: Optional[torch.Tensor]  # (O,)

    @property
    def causal(self) -> bool:
        return getattr(self.like, 'causal', False)

    def is_pointwise(self) -> bool:
        like = self.like
        return set(self.weight.shape[2:]) == {1} and set(like.padding) == {0} and set(like.stride) == {1} and (
            like.groups == 1)

    def keeps_size(self) -> bool:
        like, size = self.like, self.weight.shape[2:]
        if set(like.stride) != {1}:
            return False
        if self.causal:
            return set(like.dilation) == {1}
        return all(k % 2 for k in size) and (
            tuple(like.padding) == tuple(d * (k // 2) for k, d in zip(size, like.dilation)))

    def dense_weight(self) -> torch.Tensor:
        """The weight with zeros in the holes of its dilation."""
        dilation, size = self.like.dilation, self.weight.shape[2:]
        dense = self.weight.new_zeros(
            *self.weight.shape[:2], *(d * (k - 1) + 1 for k, d in zip(size, dilation)))
        taps: Any = (..., *(slice(None, None, d) for d in dilation))
        dense[taps] = self.weight
        return dense

    def _is_large(self) -> bool:
        dense_smp = hasattr(self.like, 'kernel') and self.like.groups == 1
        return isinstance(self.like, MergedLargeConv2d) or (dense_smp and self.keeps_size())

    def build(self) -> Any:
        """The convolution as a plain module in evaluation mode; draws no random numbers."""
        like, bias = self.like, self.bias is not None
        size: Any = tuple(self.weight.shape[2:])
        channels, dtype = (like.in_channels, like.out_channels), getattr(like, 'kernel', like).weight.dtype
        dd = {'device': 'meta', 'dtype': dtype}
        conv: Any
        if self.weight.ndim == 3:
            if tuple(like.dilation) != (1,):
                raise refused(like, '', 'must have dilation 1')
            conv = MergedConv1d(
                *channels, size[0], like.stride[0], like.padding[0], like.groups, bias, self.causal, **dd)
        elif self._is_large():
            conv = MergedLargeConv2d(*channels, size, bias, **dd)
        else:
            conv = MergedConv2d(
                *channels, size, like.stride, like.padding, like.dilation, like.groups, bias, **dd)
        conv.weight = nn.Parameter(self.weight.detach().to(dtype))
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias.detach().to(dtype))
        conv.training = False
        return conv


def values(conv: Any, kinds: Sequence[Any], path: str) -> Convolution:
    """The values of a convolution that is padded with zeros and computes nothing else.

    Args:
        conv: A module.
        kinds: The classes whose `forward` it may have. The weight is what its method `render` returns if the class has
            one, and else its parameter.
        path: What the error calls it.

    Raises:
        MergeError: It is not such a convolution.
    """
    check_added(conv, path)
    kind = next((kind for kind in kinds if kind.forward is forward_of(conv)), None)
    plain = kind is not None and getattr(conv, 'padding_mode', 'zeros') == 'zeros' and (
        not isinstance(conv.padding, str) and getattr(conv, 'activation', 'none') == 'none')
    if not plain:
        raise refused(conv, path, 'must be an SMPConv1d, SMPConv2d, nn.Conv1d or nn.Conv2d padded with zeros')
    parts = conv
    if conv.training and any(is_parametrized(part) for part in conv.modules()):
        parts = deepcopy(conv).eval()  # some parametrizations change in training mode when they compute
    weight = parts.render() if hasattr(kind, 'render') else parts.weight
    return Convolution(conv, exact(weight), None if parts.bias is None else exact(parts.bias))


def with_norm(conv: Convolution, norm: nn.Module, path: str) -> Convolution:
    """The convolution that equals `norm` behind `conv`."""
    scale, shift = affine(norm, path, len(conv.weight), conv.weight.device)
    weight = conv.weight * scale.reshape(-1, *[1] * (conv.weight.ndim - 1))
    return conv._replace(weight=weight, bias=shift if conv.bias is None else conv.bias * scale + shift)


def add_small(large: Convolution, small: Convolution) -> Convolution:
    """The convolution that equals the sum of a large and a small one: the small kernel is padded with zeros."""
    for name, branch in (('large', large), ('small', small)):
        if not branch.keeps_size():
            raise refused(branch.like, name, 'must be a convolution that keeps the size')
    if set(large.like.dilation) != {1}:
        raise refused(large.like, 'large', 'must have dilation 1')
    if small.weight.shape[:2] != large.weight.shape[:2] or small.causal != large.causal or (
            small.weight.ndim != large.weight.ndim):
        raise refused(small.like, 'small', 'must have the channels, groups and alignment of the large branch')
    pad, taps = [], small.dense_weight()
    for k, s in zip(reversed(large.weight.shape[2:]), reversed(taps.shape[2:])):
        if s > k:
            raise refused(small.like, 'small', 'must not be larger than the large branch')
        pad += [k - s, 0] if large.causal else [(k - s) // 2] * 2
    bias = large.bias if small.bias is None else small.bias if large.bias is None else large.bias + small.bias
    return large._replace(weight=large.weight + F.pad(taps, pad), bias=bias)


def affine(
        norm: Any,
        path: str,
        channels: int,
        device: Optional[torch.device] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift, (C,) each, that a BatchNorm applies in evaluation mode, in the merging precision."""
    check_added(norm, path)
    if forward_of(norm) is nn.Identity.forward:
        return exact(torch.ones(channels, device=device)), exact(torch.zeros(channels, device=device))
    if forward_of(norm) not in _NORM_FORWARDS:
        raise refused(norm, path, 'must be a BatchNorm or an Identity')
    for name in ('drop', 'act'):
        part = getattr(norm, name, None)
        if part is not None:
            check_forward(part, f'{path}.{name}', nn.Identity)
    if norm.running_var is None:
        raise refused(norm, path, 'must have running statistics')
    scale = (exact(norm.running_var) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * exact(norm.weight)
    shift = -exact(norm.running_mean) * scale
    return scale, shift if norm.bias is None else shift + exact(norm.bias)


def absorb(module: nn.Module, act: nn.Module) -> nn.Module:
    """Let a `MergedConv2d` compute `act` if it can; returns the activation that is left to do."""
    activation = None
    if added_to(act):
        return deepcopy(act)
    if forward_of(act) is nn.ReLU.forward:
        activation = 'relu'
    elif isinstance(act, nn.GELU) and forward_of(act) is nn.GELU.forward and act.approximate == 'none':
        activation = 'gelu'
    if activation is None or not isinstance(module, MergedConv2d) or module.activation != 'none':
        return deepcopy(act)
    module.activation = activation
    return nn.Identity().eval()


def exact(x: torch.Tensor) -> torch.Tensor:
    """x in the merging precision."""
    return x.to(torch.float32 if x.device.type == 'mps' else torch.float64)
