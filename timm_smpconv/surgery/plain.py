"""Merged models as modules of PyTorch, for tools that look inside: quantisation, attribution, counting, pruning.

Shapes: B batch, C channels, H and W height and width, L length, K kernel size.
"""
from copy import deepcopy
from typing import Any, cast

import torch.nn as nn
from torch.nn.utils.parametrize import is_parametrized

from ..layers._checks import added_to, forward_of
from ..layers.merged import MERGED_CONVS, MergedBlock
from ..layers.smp_kernel import SMPKernel

__all__ = ['to_plain']

_MERGED = (MergedBlock, *MERGED_CONVS)


def to_plain(model: nn.Module, inplace: bool = False) -> nn.Module:
    """A merged model whose convolutions and activations are PyTorch's own modules.

    Merged convolutions hide an activation, a residual or padding, and choose the fastest way to compute themselves.
    Tools that quantise, attribute, count or prune module by module need `nn.Conv2d`, `nn.Conv1d`, `nn.ReLU` and
    `nn.GELU` themselves, each called once in a forward pass, and no activation that overwrites its input. This function
    asks each module that has a method `to_plain` for such modules. Names in the state dict stay the same, so a merged
    checkpoint loads. The logits are the same up to rounding. The result is slower, with large kernels several times:
    for inference in PyTorch keep the merged model.

    Call it before you add adapters (LoRA), too. Adapters on a merged convolution act behind its activation, of which
    they do not know, but in front of it once they are merged into its weight: the logits then differ.

    A convolution outside this package's networks becomes an `nn.Sequential` with the children `conv` and `act` if it
    has an activation, or `pad` and `conv` if it is causal.

    Args:
        model: Merged by `timm.utils.reparameterize_model`, or holding such models.
        inplace: Change the model itself instead of a copy.

    Returns:
        The model. A merged convolution or block itself is replaced in either case.

    Raises:
        ValueError: A part of the model is not merged, or would lose hooks or a parametrization.

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
    for name, module in model.named_modules():
        if isinstance(module, _MERGED) and forward_of(module) is type(module).forward:
            added = added_to(module)
            if is_parametrized(module):
                added = 'a parametrization (parametrize.remove_parametrizations removes it)'
            if added:
                raise ValueError(f'model must be as it was merged, got {name or type(module).__name__} with {added}')
    return _convert(model if inplace else deepcopy(model))


def _convert(module: nn.Module) -> nn.Module:
    """What takes a module's place. A module without a method `to_plain` stays, and its children are replaced."""
    if hasattr(module, 'to_plain'):
        module = cast(Any, module).to_plain()
    for name, child in module._modules.items():  # named_children() leaves out a child's second name
        plain = None if child is None else _convert(child)
        if plain is not child:
            setattr(module, name, plain)
    if getattr(module, 'inplace', False) is True:
        cast(Any, module).inplace = False
    return module
