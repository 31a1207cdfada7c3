"""Merged models as modules of PyTorch, for tools that look inside: quantisation, attribution, counting, pruning.

Shapes: B batch, C channels, H and W height and width, L length, K kernel size.
"""
from collections import OrderedDict
from copy import deepcopy
from typing import Any, Callable, Dict, Optional, cast

import torch
import torch.nn as nn

from .._loading import check_before_loading
from ..layers.merged import (
    MergedBlock,
    MergedConv1d,
    MergedConv2d,
    MergedLargeConv2d,
    causal_padding,
    plain_convolution,
)
from ..layers.smp_kernel import SMPKernel

__all__ = ['PlainBlock', 'to_plain']

_ACTIVATIONS: Dict[str, Callable[[], nn.Module]] = {'none': nn.Identity, 'relu': nn.ReLU, 'gelu': nn.GELU}


class PlainBlock(nn.ModuleDict):
    """Layers that follow each other, and a residual: `x + layers(x)`, (B, C, H, W) → (B, C, H, W).

    Not an `nn.Sequential`: tools take those apart and would lose the residual.
    """

    def __init__(self, layers: 'OrderedDict[str, nn.Module]'):
        super().__init__(layers)
        self.register_load_state_dict_pre_hook(check_before_loading)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for layer in self.values():
            y = layer(y)
        return x + y


def to_plain(model: nn.Module, inplace: bool = False) -> nn.Module:
    """A merged model whose convolutions and activations are PyTorch's own modules.

    Merged convolutions hide an activation, a residual or padding, and are computed by whatever is the fastest. Tools
    that quantise, attribute, count or prune module by module need `nn.Conv2d`, `nn.Conv1d`, `nn.ReLU` and `nn.GELU`
    themselves, each called once in a forward pass, and no activation that overwrites its input. That is what this
    makes of them; their names in the state dict stay, so that a merged checkpoint loads. The logits are the same up to
    rounding. It is slower, with large kernels several times: for inference in PyTorch keep the merged model.

    A convolution outside this package's networks becomes an `nn.Sequential` with the children `conv` and `act` if it
    has an activation, or `pad` and `conv` if it is causal.

    Args:
        model: Merged by `timm.utils.reparameterize_model`, or holding such models.
        inplace: Change the model itself, not a copy.

    Returns:
        The model. A merged convolution or block itself is replaced in either case.

    Raises:
        ValueError: A part of the model is not merged.

    Example:
        >>> import timm, timm_smpconv
        >>> model = timm.create_model('smpconv_mobile31', inference_mode=True)
        >>> timm_smpconv.to_plain(model).stages[0].blocks[0]
        PlainBlock(
          (pw1): Conv2d(64, 64, kernel_size=(1, 1), stride=(1, 1))
          (act1): ReLU()
          (dwconv): Conv2d(64, 64, kernel_size=(31, 31), stride=(1, 1), padding=(15, 15), groups=64)
          (act2): ReLU()
          (pw2): Conv2d(64, 64, kernel_size=(1, 1), stride=(1, 1))
        )
    """
    kernels = [name for name, module in model.named_modules() if isinstance(module, SMPKernel)]
    if kernels:
        raise ValueError(
            f'model must be merged (timm.utils.reparameterize_model), got {type(model).__name__} with the kernel '
            f'{kernels[0] or type(model).__name__}')
    return _convert(model if inplace else deepcopy(model))


def _convert(module: nn.Module) -> nn.Module:
    """What takes a module's place. A module of a class without one stays, and its children are replaced."""
    convert = _CONVERSIONS.get(type(module), getattr(type(module), 'to_plain', None))
    if convert is not None:
        module = convert(module)
    for name, child in module._modules.items():  # named_children() leaves out a child's second name
        plain = None if child is None else _convert(child)
        if plain is not child:
            setattr(module, name, plain)
    if getattr(module, 'inplace', False) is True:
        cast(Any, module).inplace = False
    return module


def _activation(conv: nn.Module, act: Optional[nn.Module] = None) -> nn.Module:
    """What a merged convolution does to its result, and the activation behind it."""
    own = _ACTIVATIONS[conv.activation if type(conv) is MergedConv2d else 'none']().train(conv.training)
    if act is None or isinstance(act, nn.Identity):
        return own
    return act if isinstance(own, nn.Identity) else nn.Sequential(own, act)


def _without_identities(**layers: nn.Module) -> 'OrderedDict[str, nn.Module]':
    return OrderedDict((name, layer) for name, layer in layers.items() if not isinstance(layer, nn.Identity))


def _sequence(**layers: nn.Module) -> nn.Module:
    found = _without_identities(**layers)
    return found['conv'] if len(found) == 1 else nn.Sequential(found).train(found['conv'].training)


def _plain_conv1d(conv: MergedConv1d) -> nn.Module:
    return _sequence(pad=causal_padding(conv) if conv.causal else nn.Identity(), conv=plain_convolution(conv))


def _plain_conv2d(conv: MergedConv2d) -> nn.Module:
    return _sequence(conv=plain_convolution(conv), act=_activation(conv))


def _plain_block(block: MergedBlock) -> nn.Module:
    dwconv = block.dwconv
    plain = PlainBlock(_without_identities(
        pw1=plain_convolution(block.pw1), act1=_activation(block.pw1, block.act1),
        dwconv=plain_convolution(dwconv) if type(dwconv) is MergedConv2d else dwconv,
        act2=_activation(dwconv, block.act2), pw2=block.pw2))
    plain.training = block.training
    return plain


# What a merged module becomes; the children of the result are converted afterwards. Blocks of networks have a method
# `to_plain` for it.
_CONVERSIONS: Dict[type, Callable[[Any], nn.Module]] = {
    MergedBlock: _plain_block,
    MergedConv1d: _plain_conv1d,
    MergedConv2d: _plain_conv2d,
    MergedLargeConv2d: plain_convolution,
}
