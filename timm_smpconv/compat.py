"""Small things that timm does not offer under a public name.

This is the only module that imports private names of timm. Each function says what happens when its name is gone.
"""
import logging
from typing import Any, Callable, List, Optional, Tuple, Union

import torch
from timm.optim import OptimInfo

__all__ = ['feature_take_indices', 'register_dataset', 'register_optimizer']

_logger = logging.getLogger(__name__)


def register_optimizer(info: OptimInfo) -> None:
    """Register an optimizer with timm, so that `create_optimizer_v2` and `train.py --opt` find it by name.

    timm's registry is private. If it is gone, this logs a warning: the optimizer's class works as before, and timm
    raises its own error for the name.

    Example:
        >>> import timm, timm_smpconv  # which registers its optimizers
        >>> timm.optim.get_optimizer_info('smpadamw').opt_class is timm_smpconv.SMPAdamW
        True
    """
    try:
        from timm.optim._optim_factory import default_registry
        default_registry.register(info)
    except (ImportError, AttributeError, TypeError) as error:
        _logger.warning(
            'timm has no optimizer named %s: its registry was not found (%s). Use the class %s instead',
            info.name, error, getattr(info.opt_class, '__name__', info.opt_class))


def register_dataset(name: str, dataset: Callable[..., Any]) -> None:
    """Register a dataset with timm, so that `create_dataset` and `train.py --dataset` find it as `torch/NAME`.

    timm's table is private. If it is gone, this logs a warning, and timm raises its own error for the name.

    Args:
        name: Lower case, without 'torch/'.
        dataset: Called with root, train and download.

    Example:
        >>> from timm.data import create_dataset
        >>> from timm_smpconv.compat import register_dataset
        >>> register_dataset('three', lambda root, train, download: [1, 2, 3])
        >>> create_dataset('torch/three')
        [1, 2, 3]
    """
    try:
        from timm.data.dataset_factory import _TORCH_BASIC_DS
        _TORCH_BASIC_DS[name] = dataset
    except (ImportError, TypeError) as error:
        _logger.warning('timm has no dataset torch/%s: its table of datasets was not found (%s)', name, error)


def feature_take_indices(
        num_features: int,
        indices: Optional[Union[int, List[int]]] = None,
) -> Tuple[List[int], int]:
    """Resolve the `indices` of `forward_intermediates`, as timm does. Can be compiled by TorchScript.

    Args:
        num_features: Number of features to choose from.
        indices: The last n for an integer, all for None, else a list; negative ones count from the end.

    Returns:
        The chosen indices, counted from 0, and the largest of them.

    Raises:
        ValueError: An index is out of range, or none is chosen.

    Example:
        >>> from timm_smpconv.compat import feature_take_indices
        >>> feature_take_indices(4, [0, -2])
        ([0, 2], 2)
        >>> feature_take_indices(4, 3)
        ([1, 2, 3], 3)
    """
    if indices is None:
        indices = num_features
    if isinstance(indices, int):
        if not 0 < indices <= num_features:
            raise ValueError(f'indices must be from 1 to {num_features}, got {indices}')
        taken = list(range(num_features - indices, num_features))
    else:
        taken = torch.jit.annotate(List[int], [])
        for index in indices:
            if not -num_features <= index < num_features:
                raise ValueError(f'indices must be from {-num_features} to {num_features - 1}, got {index}')
            taken.append(index % num_features)
        if len(taken) == 0:
            raise ValueError('indices must name at least one feature, got an empty list')
    return taken, max(taken)
