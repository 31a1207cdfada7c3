"""The rules of training for the points of SMP kernels, as hooks on any optimizer's step.

Radii learn at a tenth of the learning rate (the paper's appendix, 1.1) and are back in their range after every step;
positions and radii have no weight decay, the points' weights do. `SMPAdamW` and `SMPAdam`, registered with timm as
`smpadamw` and `smpadam`, follow the rules by themselves; `add_point_rules` adds them to any other optimizer.

The rules are options of the parameter groups: groups of radii hold `radius_range` and `radius_lr_scale`. They are part
of the optimizer's state dict, and copies and pickles keep them.
"""
import logging
import math
from functools import partial
from typing import Any, Dict, Iterable, List, Optional, TypeVar, Union
from weakref import proxy

import torch
import torch.nn as nn
from timm.optim import OptimInfo
from torch.optim import Optimizer

from .layers._checks import check_points
from .layers.smp_kernel import SMPKernel, live_kernels

__all__ = ['SMPAdam', 'SMPAdamW', 'add_point_rules', 'smp_param_groups']

_logger = logging.getLogger(__name__)
_OptimizerT = TypeVar('_OptimizerT', bound=Optimizer)


def smp_param_groups(
        params: Union[nn.Module, Iterable[Any]],
        *,
        radius_lr_scale: float = 0.1,
) -> List[Dict[str, Any]]:
    """Split positions and radii off their parameter groups, and note the rules of the points there.

    Positions and radii get no weight decay. The optimizers of this module follow the other rules; another optimizer
    needs `add_point_rules`, which splits the groups by itself.

    Args:
        params: A model, in which the points are found through its modules. Or parameters, or groups of them, as torch's
            optimizers take them; then all SMP kernels that exist are searched for them.
        radius_lr_scale: Factor on the learning rate of radii, at least 0.

    Raises:
        ValueError: radius_lr_scale is negative or not finite, or a position or radius is not finite.

    Example:
        >>> from timm_smpconv import SMPConv2d
        >>> for group in smp_param_groups(SMPConv2d(8, 8, 31, groups=8)):
        ...     print([tuple(p.shape) for p in group.pop('params')], group)
        [(8,), (1, 8, 240)] {}
        [(1, 240, 2)] {'weight_decay': 0.0}
        [(1, 240)] {'weight_decay': 0.0, 'radius_range': (0.001, 1.0), 'radius_lr_scale': 0.1}
    """
    _check_scale(radius_lr_scale)
    model = params if isinstance(params, nn.Module) else None
    members = list(params.parameters() if isinstance(params, nn.Module) else params)
    groups = members if members and isinstance(members[0], dict) else [{'params': members}]
    return _split(groups, radius_lr_scale, model)


def add_point_rules(
        optimizer: _OptimizerT,
        model: Optional[nn.Module] = None,
        radius_lr_scale: float = 0.1,
) -> _OptimizerT:
    """Make an optimizer follow the rules of the points: their rates, their weight decay and the range of the radii.

    Call it before a learning rate scheduler is made and before a state is loaded: it splits parameter groups, as
    `smp_param_groups` does, those added later by `add_param_group` too. Then every `step()` scales the learning rate
    of radii, whatever a scheduler or layer decay has set, and clamps radii to their range; an average of the weights
    updated after it sees radii in range (the authors' loop averages before it clamps).

    The rules are step hooks, which torch drops from a deep copy or pickle of the optimizer: call this function again
    on the copy. The optimizers of this module do that themselves. A state dict saved without the rules, as by version
    0.1.0, brings its own rates: then radii are clamped, but their rate is not scaled again.

    Args:
        optimizer: Any optimizer with parameter groups. Of timm's Lookahead and accelerate's wrapper, the wrapped one.
        model: Where to find points; by default in all SMP kernels that exist.
        radius_lr_scale: Factor on the learning rate of radii, at least 0. Groups of `smp_param_groups` keep theirs.

    Returns:
        The same optimizer.

    Raises:
        ValueError: radius_lr_scale is negative or not finite, a position or radius is not finite, or the optimizer
            takes a single group (LBFGS) or no learning rate (`lr=None`). The optimizer is unchanged.

    Example:
        >>> from timm_smpconv import SMPConv2d
        >>> layer = SMPConv2d(8, 8, 31, groups=8)
        >>> optimizer = add_point_rules(torch.optim.SGD(layer.parameters(), lr=1e6), layer)
        >>> layer(torch.randn(1, 8, 32, 32)).square().sum().backward()
        >>> optimizer.step()
        >>> 0.001 <= layer.kernel.radius.min().item() and layer.kernel.radius.max().item() <= 1
        True
    """
    _check_scale(radius_lr_scale)
    wrapped = getattr(optimizer, '_base_optimizer', getattr(optimizer, 'optimizer', None))
    if isinstance(wrapped, Optimizer):
        add_point_rules(wrapped, model, radius_lr_scale)
        return optimizer
    if isinstance(optimizer, torch.optim.LBFGS) or any(group['lr'] is None for group in optimizer.param_groups):
        raise ValueError(
            f'optimizer must support parameter groups with learning rates, got {type(optimizer).__name__} with lr = '
            f'{[group["lr"] for group in optimizer.param_groups]}')
    optimizer.param_groups[:] = _split(optimizer.param_groups, radius_lr_scale, model)
    optimizer.defaults['radius_lr_scale'] = radius_lr_scale
    _register_hooks(optimizer)
    return optimizer


def _check_scale(radius_lr_scale: float) -> None:
    if not 0 <= radius_lr_scale < math.inf:
        raise ValueError(f'radius_lr_scale must be at least 0 and finite, got {radius_lr_scale}')


def _split(
        groups: Iterable[Dict[str, Any]],
        radius_lr_scale: float,
        model: Optional[nn.Module] = None,
) -> List[Dict[str, Any]]:
    """Split each group into ordinary parameters, positions, and radii by range; drop empty groups."""
    kernels = live_kernels() if model is None else [m for m in model.modules() if isinstance(m, SMPKernel)]
    coords = {id(k.coords) for k in kernels}
    ranges = {id(k.radius): k.radius_range for k in kernels}
    split = []
    for group in groups:
        if 'radius_range' in group:
            split.append(group)
            continue
        members = group['params']
        members = [members] if isinstance(members, torch.Tensor) else list(members)
        names = group.get('param_names', [None] * len(members))
        parts: Dict[Any, List[Any]] = {'others': [], 'coords': []}
        for name, member in zip(names, members, strict=True):
            named, param = member if isinstance(member, tuple) else (name, member)
            kind = 'coords' if id(param) in coords else ranges.get(id(param), 'others')
            if kind != 'others':
                check_points(named or f'{"coords" if kind == "coords" else "radius"} {tuple(param.shape)}', param)
            parts.setdefault(kind, []).append((name, member))
        for kind, chosen in parts.items():
            if not chosen:
                continue
            part = dict(group, params=[member for _, member in chosen])
            if 'param_names' in group:
                part['param_names'] = [name for name, _ in chosen]
            if kind != 'others':
                part['weight_decay'] = 0.
            if kind not in ('others', 'coords'):
                part.update(radius_range=kind, radius_lr_scale=radius_lr_scale)
            split.append(part)
    return split


def _register_hooks(optimizer: Optimizer) -> None:
    if 'add_param_group' in vars(optimizer):
        return  # has them
    optimizer.register_step_pre_hook(_scale_rates)
    optimizer.register_step_post_hook(_restore_rates_and_clamp)
    optimizer.register_load_state_dict_post_hook(_mark_loaded_groups)
    # A weak reference, as an optimizer that refers to itself would outlive its last user.
    vars(optimizer)['add_param_group'] = partial(_add_param_group, proxy(optimizer))


def _add_param_group(optimizer: Optimizer, param_group: Dict[str, Any]) -> None:
    for part in _split([param_group], optimizer.defaults['radius_lr_scale']):
        optimizer.__class__.add_param_group(optimizer, part)


def _mark_loaded_groups(optimizer: Optimizer) -> None:
    optimizer.param_groups[:] = _split(optimizer.param_groups, radius_lr_scale=1.)


def _radius_groups(optimizer: Optimizer) -> List[Dict[str, Any]]:
    return [group for group in optimizer.param_groups if 'radius_range' in group]


def _scale_rates(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for group in _radius_groups(optimizer):
        if 'whole_lr' not in group:  # else a step whose hooks have run calls another one that has hooks
            group.update(lr=group['lr'] * group['radius_lr_scale'], whole_lr=group['lr'])


@torch.no_grad()
def _restore_rates_and_clamp(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for group in _radius_groups(optimizer):
        group['lr'] = group.pop('whole_lr', group['lr'])
        for radius in group['params']:
            radius.clamp_(*group['radius_range'])


class SMPAdam(torch.optim.Adam):
    """`torch.optim.Adam` that follows the rules of the points, see `add_point_rules`.

    Weight decay is an L2 term of the gradient.

    Args:
        params: See `smp_param_groups`.
        lr: Learning rate.
        radius_lr_scale: Factor on the learning rate of radii, at least 0.
        **kwargs: See `torch.optim.Adam`.

    Example:
        >>> from timm_smpconv import SMPConv2d
        >>> optimizer = SMPAdam(SMPConv2d(8, 8, 31, groups=8), lr=1e-3, weight_decay=1e-5)
        >>> [(group['lr'], group['weight_decay']) for group in optimizer.param_groups]
        [(0.001, 1e-05), (0.001, 0.0), (0.001, 0.0)]
    """

    def __init__(
            self,
            params: Union[nn.Module, Iterable[Any]],
            lr: Union[float, torch.Tensor] = 1e-3,
            radius_lr_scale: float = 0.1,
            **kwargs: Any,
    ):
        super().__init__(smp_param_groups(params, radius_lr_scale=radius_lr_scale), lr=lr, **kwargs)
        add_point_rules(self, radius_lr_scale=radius_lr_scale)

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        _register_hooks(self)  # a deep copy or pickle comes without


class SMPAdamW(SMPAdam, torch.optim.AdamW):
    """`torch.optim.AdamW` that follows the rules of the points, with the arguments of `SMPAdam`.

    Weight decay is decoupled from the gradient.

    Example:
        >>> from timm_smpconv import SMPConv2d
        >>> optimizer = SMPAdamW(SMPConv2d(8, 8, 31, groups=8), lr=1e-3, weight_decay=0.05)
    """


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


for _name, _class, _base in (('smpadamw', SMPAdamW, torch.optim.AdamW), ('smpadam', SMPAdam, torch.optim.Adam)):
    register_optimizer(OptimInfo(
        name=_name, opt_class=_class, has_betas=True,
        description=f'torch.optim.{_base.__name__}; radii of SMP kernels at 0.1 × the learning rate'))
