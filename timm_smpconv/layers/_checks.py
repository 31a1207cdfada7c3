"""Checks of arguments (inputs, sizes and points), and of what a module computes.

Shapes: B batch, C channels, H and W height and width, L length, K kernel size.
"""
import operator
from typing import Any, Tuple, Union

import torch
import torch.fx
import torch.nn as nn
from timm.layers import to_2tuple

__all__ = [
    'added_to', 'check_images', 'check_length', 'check_odd', 'check_padding', 'check_points', 'check_sequences',
    'forward_of', 'input_channels', 'odd_sizes', 'single']

_int_or_pair = Union[int, Tuple[int, int]]

_REMOVERS = {  # of hooks, by the module of their class
    'torch.nn.utils.prune': 'prune.remove', 'torch.nn.utils.weight_norm': 'remove_weight_norm',
    'torch.nn.utils.spectral_norm': 'remove_spectral_norm'}


@torch.fx.wrap
def check_images(x: torch.Tensor, channels: int, least: int = 1) -> None:
    """Raise an error unless x is (B, channels, H, W), floating point, with H and W at least `least`.

    0 stands for any number of channels. One node in an FX graph, and nothing in a trace.
    """
    if torch.jit.is_tracing():
        return
    c = str(channels) if channels > 0 else 'C'
    if not torch.jit.is_scripting() and not isinstance(x, torch.Tensor):
        raise TypeError(f'x must be a tensor of shape (B, {c}, H, W), got {type(x).__name__}')
    if x.ndim != 4 or (channels > 0 and x.shape[1] != channels) or x.shape[2] < least or x.shape[3] < least:
        raise ValueError(f'x must be (B, {c}, H, W) with H and W at least {least}, got shape {list(x.shape)}')
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


def check_points(name: str, tensor: torch.Tensor) -> None:
    """Check the `coords` or `radius` of a state dict.

    A tensor on the meta device passes. Each process checks its own shard of a `DTensor`, without communication.

    Args:
        name: What the error calls the tensor.
        tensor: Any shape.

    Raises:
        ValueError: The tensor is not dense or not floating-point, or holds NaN or infinity.

    Example:
        >>> check_points('kernel.radius', torch.tensor([[-1., 2.]]))
        >>> check_points('kernel.radius', torch.tensor([[0.5, float('nan')]]))
        Traceback (most recent call last):
        ValueError: kernel.radius must be finite everywhere, got nan
    """
    if not tensor.is_floating_point() or tensor.layout is not torch.strided:
        raise ValueError(f'{name} must be a dense floating-point tensor, got {tensor.dtype}, {tensor.layout}')
    if tensor.is_meta:
        return
    value = tensor.detach()
    if hasattr(value, 'to_local'):
        value = value.to_local()
    if value.dtype.itemsize == 1:
        value = value.float()  # `isfinite` does not support every 8-bit dtype
    wrong = value[~value.isfinite()]
    if wrong.numel():
        raise ValueError(f'{name} must be finite everywhere, got {wrong[0].item()}')


def odd_sizes(kernel_size: _int_or_pair, small_kernel: _int_or_pair) -> Tuple[Tuple[int, int], Tuple[int, int]]:
    """Both sizes of a `RepSMPConv2d` as pairs; raises a ValueError unless they are odd and the small one fits."""
    large, small = check_odd('kernel_size', kernel_size), check_odd('small_kernel', small_kernel)
    if small[0] > large[0] or small[1] > large[1]:
        raise ValueError(f'small_kernel must not be larger than kernel_size = {large}, got {small}')
    return large, small


def check_odd(name: str, size: _int_or_pair) -> Tuple[int, int]:
    try:
        pair: Tuple[int, ...] = tuple(map(operator.index, to_2tuple(size)))
    except TypeError:
        raise ValueError(f'{name} must be one or two integers, got {size!r}') from None
    if len(pair) != 2 or any(k < 1 or k % 2 == 0 for k in pair):
        raise ValueError(f'{name} must be odd and positive, got {pair}')
    return pair[0], pair[1]


def check_length(kernel_size: Any, causal: bool) -> int:
    k = single('kernel_size', kernel_size)
    if k < 2 or (k % 2 == 0 and not causal):
        rule = 'at least 2' if causal else 'odd and at least 3, unless causal'
        raise ValueError(f'kernel_size must be {rule}, got {k}')
    return k


def check_padding(padding: Any, size: Tuple[int, ...], stride: Tuple[int, ...]) -> Any:
    """Padding as a number or numbers."""
    if not isinstance(padding, str):
        return padding
    if padding not in ('same', 'valid') or (padding == 'same' and set(stride) != {1}):
        raise ValueError(f"padding must be numbers, 'valid' or, at stride 1, 'same', got {padding!r}")
    return tuple(k // 2 for k in size) if padding == 'same' else 0


def single(name: str, value: Any) -> int:
    """A number, or the number in a sequence of one."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(values) != 1 or not isinstance(values[0], int):
        raise ValueError(f'{name} must be an integer, got {value!r}')
    return values[0]


def input_channels(module: nn.Module) -> int:
    """The channels that the first convolution in a module takes; 0 if it has none."""
    for part in module.modules():
        channels: Any = getattr(part, 'in_channels', 0)
        if channels:
            return channels
    return 0


def forward_of(module: nn.Module) -> Any:
    """The function behind the method `forward` of a module; None if it is not a method."""
    return getattr(module.forward, '__func__', None)


def added_to(module: nn.Module) -> str:
    """What makes a call of a module compute something else than the `forward` of its class; '' if nothing does.

    Backward hooks do not. Parametrizations change parameters, which whoever reads them gets.
    """
    for kind, hooks in (('pre-hook', module._forward_pre_hooks), ('hook', module._forward_hooks)):
        for hook in hooks.values():
            remover = _REMOVERS.get(type(hook).__module__, 'handle.remove')
            return f'the forward {kind} {getattr(hook, "__name__", type(hook).__name__)} ({remover} removes it)'
    if hasattr(module, '_orig_mod'):
        return 'torch.compile around it (compile the merged model)'
    if forward_of(module) is not type(module).forward:
        remover = 'accelerate.hooks.remove_hook_from_module' if hasattr(module, '_hf_hook') else 'del module.forward'
        return f'another forward assigned ({remover} removes it)'
    return ''
