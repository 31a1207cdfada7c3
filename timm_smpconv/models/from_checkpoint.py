"""Build a network from its name and a checkpoint, whose weights tell the arguments that the network was built with."""
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Optional, Union

import timm
import torch
import torch.nn as nn

from .._errors import DataError, one_line
from ..weights.checkpoint import (
    CheckpointError,
    checkpoint_filter_fn,
    count_classes,
    count_inputs,
    is_authors_layout,
    read_checkpoint,
    select_weights,
)
from ._base import SMPNet

__all__ = ['arguments_of', 'build_network', 'network_of']


def build_network(name: str, checkpoint: Optional[Path] = None, pretrained: bool = False) -> nn.Module:
    """A network of timm in evaluation mode, with the weights of a checkpoint.

    Classes and input channels are those of the checkpoint; of this package's networks also the length of the sequences
    and whether the network is merged. EMA weights are preferred.

    Args:
        name: Of a registered model.
        checkpoint: What `read_checkpoint` reads.
        pretrained: Without a checkpoint, take the weights that timm downloads, not initial ones.

    Raises:
        ValueError: No model has this name.
        DataError: Its weights cannot be downloaded.
        CheckpointError: The checkpoint cannot be read, or does not fit the model.

    Example:
        >>> from safetensors.torch import save_file
        >>> model = timm.create_model('smpconv_mobile31', num_classes=7, in_chans=1)
        >>> save_file(model.state_dict(), 'model.safetensors')
        >>> build_network('smpconv_mobile31', Path('model.safetensors')).num_classes
        7
    """
    if not timm.is_model(name):
        raise ValueError(f'MODEL must be a name that timm.list_models() lists, got {name!r}')
    try:
        model = timm.create_model(name, pretrained=pretrained and checkpoint is None)
    except (OSError, RuntimeError) as error:  # an unknown tag; of the Hub's client
        raise DataError(f'MODEL {name!r} must have weights that can be loaded: {one_line(error)}') from error
    if checkpoint is not None:
        content = read_checkpoint(checkpoint)
        try:
            state_dict = select_weights(content)[0]
            model = network_of(name, state_dict, arguments_of(model, state_dict))
        except (RuntimeError, TypeError, ValueError) as error:  # of the loading; of arguments that no network has
            raise CheckpointError(f'{checkpoint} must be a checkpoint of {name}, got: {one_line(error)}') from error
    return model.eval()


def network_of(
        name: str,
        state_dict: Mapping[str, Any],
        arguments: Mapping[str, Any],
) -> Any:
    """A network of timm with the weights of a state dict, in the layout of timm or of the authors.

    Args:
        name: Of a registered model.
        state_dict: As `select_weights` returns it.
        arguments: Of the network, such as those that `arguments_of` finds.

    Raises:
        CheckpointError: The state dict does not fit the network.
    """
    model = timm.create_model(name, **arguments)
    if isinstance(model, SMPNet):
        state_dict = checkpoint_filter_fn(state_dict, model)
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise CheckpointError(f'state_dict must fit {name}, got: {one_line(error)}') from error
    return model


def arguments_of(like: nn.Module, state_dict: Mapping[str, Any]) -> Dict[str, Any]:
    """The arguments of the network that a state dict was saved from, as far as its weights tell them.

    Args:
        like: The model of that name with its own arguments, on any device.
        state_dict: See `network_of`.
    """
    shapes = {key: tuple(value.shape) for key, value in state_dict.items() if isinstance(value, torch.Tensor)}
    if isinstance(like, SMPNet):
        arguments: Dict[str, Any] = dict(
            num_classes=count_classes(shapes), in_chans=count_inputs(shapes, like.input_weights))
        if not is_authors_layout(shapes) and not any(key.endswith('.kernel.coords') for key in shapes):
            arguments['inference_mode'] = True
        if 'stem.kernel_length' in shapes:
            length = int(state_dict['stem.kernel_length'])
            seq_len = shapes.get('stem.permutation', (length,))[0]
            arguments.update(seq_len=seq_len, **({} if length == seq_len else dict(kernel_size=length)))
    else:
        cfg: Mapping[str, Any] = getattr(like, 'pretrained_cfg', None) or {}
        arguments = dict(
            num_classes=_size(shapes, cfg.get('classifier'), 0), in_chans=_size(shapes, cfg.get('first_conv'), 1))
    return {key: value for key, value in arguments.items() if value or key == 'num_classes'}


def _size(shapes: Mapping[str, Any], modules: Union[str, Iterable[str], None], dimension: int) -> int:
    """A dimension of the weight of the first of some modules that has one, else 0."""
    names: List[str] = [modules] if isinstance(modules, str) else list(modules or ())
    found = (shapes[f'{name}.weight'] for name in names if f'{name}.weight' in shapes)
    return next((shape[dimension] for shape in found if len(shape) > dimension), 0)
