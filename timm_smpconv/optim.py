"""The rules of training for the points of SMP kernels, as hooks around any optimizer's step.

Radii move a tenth of the step that the optimizer takes (the paper's appendix, 1.1), and are back in their range after
it. Positions and radii have no weight decay; the points' weights do. `SMPAdamW` and `SMPAdam`, registered with timm as
`smpadamw` and `smpadam`, follow the rules by themselves; `add_point_rules` adds them to any other optimizer.

The parameter groups stay the user's. They get one option, `radius_lr_scale`.
"""
import logging
import math
from typing import Any, Dict, Iterable, List, Optional, Tuple, TypeVar, Union

import torch
import torch.nn as nn
from timm.optim import OptimInfo
from torch.optim import Optimizer

from .layers._checks import check_points
from .layers.smp_kernel import live_kernels

__all__ = ['SMPAdam', 'SMPAdamW', 'add_point_rules', 'smp_param_groups']

_logger = logging.getLogger(__name__)
_OptimizerT = TypeVar('_OptimizerT', bound=Optimizer)
_Group = Dict[str, Any]
_Kinds = Dict[torch.Tensor, Union[str, Tuple[float, float]]]  # 'others', 'coords', or the range of a radius


def smp_param_groups(
        params: Union[nn.Module, Iterable[Any]],
        *,
        radius_lr_scale: float = 0.1,
) -> List[_Group]:
    """Split positions and radii off their parameter groups, so that they have options of their own.

    The optimizers of this module and `add_point_rules` do not need it. It is for schedules that treat radii differently
    and for optimizers that keep state by group.

    Args:
        params: A model, parameters, or groups of them, as torch's optimizers take them.
        radius_lr_scale: Factor on the steps of radii, at least 0.

    Raises:
        ValueError: radius_lr_scale is negative or not finite, or a position or radius is not finite.

    Example:
        >>> from timm_smpconv import SMPConv2d
        >>> for group in smp_param_groups(SMPConv2d(8, 8, 31, groups=8)):
        ...     print([tuple(p.shape) for p in group.pop('params')], group)
        [(8,), (1, 8, 240)] {}
        [(1, 240, 2)] {'weight_decay': 0.0}
        [(1, 240)] {'weight_decay': 0.0, 'radius_lr_scale': 0.1}
    """
    _check_scale(radius_lr_scale)
    members = list(params.parameters() if isinstance(params, nn.Module) else params)
    groups = members if members and isinstance(members[0], dict) else [{'params': members}]
    split = []
    for group in groups:
        own = group['params']
        group = dict(group, params=[own] if isinstance(own, torch.Tensor) else list(own))
        kinds = _kinds_of(group)
        for part in _split(group, kinds):
            if isinstance(kinds[_param(part['params'][0])], tuple):
                part['radius_lr_scale'] = radius_lr_scale
            split.append(part)
    return split


def add_point_rules(
        optimizer: _OptimizerT,
        model: Optional[nn.Module] = None,
        radius_lr_scale: float = 0.1,
) -> _OptimizerT:
    """Make an optimizer follow the rules of the points: their steps, their weight decay and the range of the radii.

    After each `step()`, radii have moved `radius_lr_scale` of the step that the optimizer took, and are clamped to
    their range. Where steps are proportional to the learning rate, as in SGD and AdamW, that is a factor on this rate,
    under any schedule and layer decay. An average of the weights updated after the step has radii in range (the
    authors' loop averages before it clamps). During the step, points are in groups without weight decay.

    Otherwise the groups remain as they are. The rules can be added at any time, and hold for parameters that are added
    later. State dicts of earlier versions, which split the groups, can be loaded.

    The rules are step hooks, which torch drops from a deep copy or pickle of the optimizer: call this function again
    on the copy. The optimizers of this module do that themselves.

    Args:
        optimizer: Any optimizer. Of a wrapper that calls another one's step (SAM, Lookahead, ZeroRedundancyOptimizer,
            accelerate's), that other one gets the rules.
        model: The model that the optimizer trains, to check that it does.
        radius_lr_scale: Factor on the steps of radii, at least 0. Groups with this option keep theirs.

    Returns:
        The same optimizer.

    Raises:
        ValueError: radius_lr_scale is negative or not finite, a position or radius is not finite, or the optimizer
            cannot follow the rules: it trains copies of the parameters (DeepSpeed), exchanges them in `train()` and
            `eval()` (schedule-free optimizers), or steps during the backward pass (`overlap_with_ddp`). It is
            unchanged.

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
    inner, name = _innermost(optimizer), type(optimizer).__name__
    if hasattr(inner, 'eval'):
        raise ValueError(f'optimizer must not exchange the parameters in train() and eval(), got {name}')
    if getattr(optimizer, '_overlap_with_ddp', False):
        raise ValueError(f'optimizer must step after the backward pass, got {name} with overlap_with_ddp=True')
    rules = _PointRules()
    rules.find(inner)
    is_held = inner is optimizer or rules.has_radii()
    if model is not None:
        is_held = not rules.kinds.keys().isdisjoint(model.parameters())
    if not is_held:
        raise ValueError(
            f'optimizer must train the parameters of model, got {name} with other tensors. Optimizers of copies, such '
            "as DeepSpeed's, cannot follow the rules of the points")
    inner.defaults.setdefault('radius_lr_scale', radius_lr_scale)
    for group in inner.param_groups:
        group.setdefault('radius_lr_scale', radius_lr_scale)
    rules.register(inner)
    return optimizer


def _check_scale(radius_lr_scale: float) -> None:
    if not 0 <= radius_lr_scale < math.inf:
        raise ValueError(f'radius_lr_scale must be at least 0 and finite, got {radius_lr_scale}')


def _innermost(optimizer: Optimizer) -> Optimizer:
    # In SAM, timm's Lookahead, most others (accelerate, DeepSpeed, pytorch_optimizer), AdaScale, and ZeRO.
    for name in ('base_optimizer', '_base_optimizer', 'optimizer', '_optimizer', 'optim'):
        inner = getattr(optimizer, name, None)
        if isinstance(inner, Optimizer):
            return _innermost(inner)
    return optimizer


def _param(member: Any) -> torch.Tensor:
    return member[1] if isinstance(member, tuple) else member


def _kinds_of(group: _Group) -> _Kinds:
    """What the parameters of a group are; ValueError if they are points that are not finite."""
    kernels = live_kernels()
    known: Dict[int, Any] = {id(k.radius): k.radius_range for k in kernels}
    known.update((id(k.coords), 'coords') for k in kernels)
    kinds: _Kinds = {}
    for i, member in enumerate(group['params']):
        param = _param(member)
        kinds[param] = kind = known.get(id(param), 'others')
        if kind != 'others':
            name = member[0] if isinstance(member, tuple) else group['param_names'][i] if 'param_names' in group else (
                f'{"coords" if kind == "coords" else "radius"} {tuple(param.shape)}')
            check_points(name, param)
    return kinds


def _split(group: _Group, kinds: _Kinds) -> List[_Group]:
    """Split a group into other parameters, positions and radii, the latter two without weight decay."""
    parts: Dict[str, List[int]] = {'others': [], 'coords': [], 'radii': []}
    for i, member in enumerate(group['params']):
        kind = kinds[_param(member)]
        parts['radii' if isinstance(kind, tuple) else kind].append(i)
    split = []
    for kind, chosen in parts.items():
        part = dict(group)
        part.update((key, [group[key][i] for i in chosen]) for key in ('params', 'param_names') if key in group)
        if kind != 'others':
            part['weight_decay'] = 0.
        if chosen:
            split.append(part)
    return split or [group]


class _PointRules:
    """The hooks of an optimizer, and what they keep from the start of a step to its end."""

    def __init__(self):
        self.kinds: _Kinds = {}
        self.starts: List[Tuple[torch.Tensor, torch.Tensor, float]] = []  # a radius, its value, the factor on its step
        self.parted: List[Tuple[_Group, List[torch.Tensor]]] = []  # groups without their points, and their parameters

    def register(self, optimizer: Optimizer) -> None:
        if 'point_rules' not in vars(optimizer):
            vars(optimizer)['point_rules'] = self
            optimizer.register_step_pre_hook(torch.compiler.disable(self.before_step))
            optimizer.register_step_post_hook(torch.compiler.disable(self.after_step))
            optimizer.register_state_dict_pre_hook(self.join)  # a step may have raised
            optimizer.register_load_state_dict_pre_hook(self.join_groups)

    def has_radii(self) -> bool:
        return any(isinstance(kind, tuple) for kind in self.kinds.values())

    def find(self, optimizer: Optimizer) -> None:
        """Find the points among the parameters, if these are not the same as before."""
        if self.kinds.keys() == {param for group in optimizer.param_groups for param in group['params']}:
            return
        had_radii, earlier = self.has_radii(), self.kinds
        self.kinds = {param: kind for group in optimizer.param_groups for param, kind in _kinds_of(group).items()}
        # FSDP's modules may have other tensors than their optimizer until the next forward pass.
        self.kinds.update((param, kind) for param, kind in earlier.items() if self.kinds.get(param) == 'others')
        if had_radii and not self.has_radii():
            raise RuntimeError(
                f'{type(optimizer).__name__} must train the radii with which it was made, got groups without radii. '
                'Wrappers that train copies, such as those of DeepSpeed, cannot follow the rules of the points')

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self.join(optimizer)  # a step may call another one that has hooks, or raise
        self.find(optimizer)
        self.starts = [
            (param, param.detach().clone(), group.get('radius_lr_scale', optimizer.defaults['radius_lr_scale']))
            for group in optimizer.param_groups for param in group['params'] if isinstance(self.kinds[param], tuple)]
        self.part(optimizer)
        closure = args[1] if len(args) > 1 else kwargs.get('closure')
        if not self.parted or closure is None:
            return None

        def with_whole_groups() -> Any:
            self.join(optimizer)
            loss = closure()
            self.find(optimizer)
            self.part(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], with_whole_groups, *args[2:]), kwargs
        return args, {**kwargs, 'closure': with_whole_groups}

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.join(optimizer)
        for radius, start, scale in self.starts:
            if scale != 1:
                radius.sub_(start).mul_(scale).add_(start)
            radius.clamp_(*self.kinds[radius])
        self.starts = []

    def part(self, optimizer: Optimizer) -> None:
        """Move points out of groups with weight decay, into groups behind all others."""
        for group in list(optimizer.param_groups):
            params = group['params']
            points = [param for param in params if self.kinds[param] != 'others']
            if points and group.get('weight_decay'):
                self.parted.append((group, params))
                group['params'] = [param for param in params if self.kinds[param] == 'others']
                optimizer.param_groups.append({**group, 'params': points, 'weight_decay': 0.})

    def join(self, optimizer: Optimizer) -> None:
        """Undo `part`."""
        for group, params in self.parted:
            group['params'] = params
            optimizer.param_groups.pop()
        self.parted = []

    def join_groups(self, optimizer: Optimizer, state_dict: Dict[str, Any]) -> Optional[Dict[str, Any]]:
        """Join the groups of a state that an earlier version saved, which split each as `_split` does."""
        self.join(optimizer)
        self.find(optimizer)
        saved = state_dict['param_groups']
        split = [_split(group, self.kinds) for group in optimizer.param_groups]
        parts = [part for group in split for part in group]
        if len(saved) == len(split) or [len(g['params']) for g in saved] != [len(g['params']) for g in parts]:
            return None
        index = {p: i for part, g in zip(parts, saved) for p, i in zip(part['params'], g['params'])}
        joined = []
        for group, own in zip(optimizer.param_groups, split):
            joined.append({**saved[0], 'params': [index[p] for p in group['params']]})
            joined[-1].pop('param_names', None)  # those of this optimizer
            saved = saved[len(own):]
        return {**state_dict, 'param_groups': joined}


class SMPAdam(torch.optim.Adam):
    """`torch.optim.Adam` that follows the rules of the points, see `add_point_rules`.

    Weight decay is an L2 term of the gradient.

    Args:
        params: A model, or what `torch.optim.Adam` takes.
        lr: Learning rate.
        radius_lr_scale: Factor on the steps of radii, at least 0.
        **kwargs: See `torch.optim.Adam`.

    Example:
        >>> from timm_smpconv import SMPConv2d
        >>> optimizer = SMPAdam(SMPConv2d(8, 8, 31, groups=8), lr=1e-3, weight_decay=1e-5)
        >>> [(group['lr'], group['radius_lr_scale']) for group in optimizer.param_groups]
        [(0.001, 0.1)]
    """

    def __init__(
            self,
            params: Union[nn.Module, Iterable[Any]],
            lr: Union[float, torch.Tensor] = 1e-3,
            radius_lr_scale: float = 0.1,
            **kwargs: Any,
    ):
        super().__init__(params.parameters() if isinstance(params, nn.Module) else params, lr=lr, **kwargs)
        add_point_rules(self, radius_lr_scale=radius_lr_scale)

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        _PointRules().register(self)  # a deep copy or pickle comes without


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
        description=f'torch.optim.{_base.__name__}; radii of SMP kernels move 0.1 × its step'))
