"""AdamW and Adam with the paper's rules for the points, registered with timm as `smpadamw` and `smpadam`.

Radii learn at a tenth of the rate (appendix, 1.1); positions and radii do not decay, the points' weights do.
"""
from typing import Any, Dict, Iterable, List

import torch
from timm.optim import OptimInfo

from .compat import register_optimizer
from .kernel import live_kernels

__all__ = ['SMPAdam', 'SMPAdamW', 'smp_param_groups']


def smp_param_groups(params: Iterable[Any], lr: float, radius_lr_scale: float = 0.1) -> List[Dict[str, Any]]:
    """Split positions and radii off their parameter groups, wherever in a model their `SMPKernel` is.

    Positions and radii get no weight decay, and radii `lr_scale` times radius_lr_scale. timm's schedulers multiply the
    rate of a group by its `lr_scale`; torch's own do not.

    Args:
        params: Parameters, or groups of them, as torch's optimizers take them.
        lr: Learning rate of groups that have none.
        radius_lr_scale: Factor on the learning rate of radii.

    Raises:
        ValueError: A radius is not finite.
    """
    coords, radii = set(), set()
    for kernel in live_kernels():
        coords.add(id(kernel.coords))
        radii.add(id(kernel.radius))
    params = list(params)
    groups = params if params and isinstance(params[0], dict) else [{'params': params}]
    split = []
    for group in groups:
        members = group['params']
        members = [members] if isinstance(members, torch.Tensor) else list(members)
        parts: Dict[str, List[Any]] = {'others': [], 'coords': [], 'radii': []}
        for member in members:
            param = member[1] if isinstance(member, tuple) else member
            kind = 'coords' if id(param) in coords else 'radii' if id(param) in radii else 'others'
            if kind == 'radii' and not param.is_meta and not bool(param.isfinite().all()):
                name = member[0] if isinstance(member, tuple) else f'of shape {tuple(param.shape)}'
                raise ValueError(
                    f'a radius must be finite, got {param.detach()[~param.isfinite()][0].item()} in {name}')
            parts[kind].append(member)
        for kind, chosen in parts.items():
            if not chosen:
                continue
            part = dict(group, params=chosen)
            if kind != 'others':
                part['weight_decay'] = 0.
            if kind == 'radii':
                part['lr_scale'] = group.get('lr_scale', 1.) * radius_lr_scale
            if 'lr_scale' in part:
                # Right from the first step on, and still the whole rate to the schedulers, which scale it themselves.
                part['initial_lr'] = group.get('lr', lr)
                part['lr'] = part['initial_lr'] * part['lr_scale']
            split.append(part)
    return split


class SMPAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` on `smp_param_groups`."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, radius_lr_scale: float = 0.1, **kwargs: Any):
        super().__init__(smp_param_groups(params, lr, radius_lr_scale), lr=lr, **kwargs)


class SMPAdam(torch.optim.Adam):
    """`torch.optim.Adam` on `smp_param_groups`: weight decay is an L2 term of the gradient."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, radius_lr_scale: float = 0.1, **kwargs: Any):
        super().__init__(smp_param_groups(params, lr, radius_lr_scale), lr=lr, **kwargs)


for _name, _class in (('smpadamw', SMPAdamW), ('smpadam', SMPAdam)):
    register_optimizer(OptimInfo(
        name=_name, opt_class=_class, has_betas=True,
        description=f'torch.optim.{_class.__base__.__name__}; radii of SMP kernels at 0.1 × the learning rate'))
