"""What an SMP kernel is: a convolution kernel rendered from points that move during training.

Shapes: G groups of points, C channels sharing a group's points, P points, D dimensions (1 or 2), K samples of an axis.
Coordinates live in [-1, 1].

Source: Kim and Park, "SMPConv: Self-moving Point Representations for Continuous Convolution", CVPR 2023,
https://arxiv.org/abs/2304.02330, and the authors' `smp_imagenet/models/SMPConv.py` and `smp/ckconv/nn/ck/smpkernel.py`.
"""
from typing import Iterator, List, Optional, Sequence, Tuple
from weakref import WeakSet

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ['SMPKernel', 'grid', 'render_kernel']


def grid(size: int, device: Optional[torch.device] = None, dtype: Optional[torch.dtype] = None) -> torch.Tensor:
    """Positions of the `size` samples of one axis: evenly spaced from -1 to 1, and 0 for a single sample.

    Returns:
        (K,)
    """
    if size == 1:
        return torch.zeros([1], device=device, dtype=dtype)
    return torch.linspace(-1., 1., size, device=device, dtype=dtype)


def _render(
        coords: torch.Tensor,
        radius: torch.Tensor,
        weight: torch.Tensor,
        size: List[int],
        average: bool,
) -> torch.Tensor:
    """`render_kernel` for inputs in its working precision, to be run outside autocast."""
    reach = radius.unsqueeze(-1)  # (G, P, 1)
    x = (coords[..., 0].unsqueeze(-1) - grid(size[-1], coords.device, coords.dtype)).abs()  # (G, P, K), to the right
    if len(size) == 2:
        y = (coords[..., 1].unsqueeze(-1) + grid(size[0], coords.device, coords.dtype)).abs()  # (G, P, K), upwards
        x = x.unsqueeze(-2) + y.unsqueeze(-1)  # (G, P, K, K)
        reach = reach.unsqueeze(-1)
    basis = F.relu(1 - x / reach)  # (G, P, *size)
    if average:
        basis = basis / ((basis > 0).sum(1, keepdim=True) + 1e-6)
    kernel = torch.matmul(weight, basis.flatten(2))  # (G, C, prod(size))
    return kernel.reshape([weight.shape[0], weight.shape[1]] + size)


@torch.fx.wrap
def _render_in_float(
        coords: torch.Tensor,
        radius: torch.Tensor,
        weight: torch.Tensor,
        size: List[int],
        average: bool,
) -> torch.Tensor:
    """`render_kernel` without its checks: what modules call in every forward, one node in an FX graph."""
    dtype = torch.float32
    if coords.dtype == torch.float64 or radius.dtype == torch.float64 or weight.dtype == torch.float64:
        dtype = torch.float64
    if torch.jit.is_scripting():  # TorchScript cannot leave autocast, which does not touch float64
        kernel = _render(coords.double(), radius.double(), weight.double(), size, average)
        return kernel.to(dtype)
    coords, radius, weight = coords.to(dtype), radius.to(dtype), weight.to(dtype)
    device_type = weight.device.type
    if device_type != 'meta' and torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return _render(coords, radius, weight, size, average)
    return _render(coords, radius, weight, size, average)


@torch.fx.wrap
def _project(radius: torch.Tensor, low: float, high: float) -> None:
    """Clamp in place. Through `data`, as another forward may have saved the radius: between updates nothing changes."""
    radius.data.clamp_(low, high)


def render_kernel(
        coords: torch.Tensor,
        radius: torch.Tensor,
        weight: torch.Tensor,
        size: Sequence[int],
        average: bool = False,
) -> torch.Tensor:
    r"""Render convolution kernels from points.

    Every channel c of a group is the sum of its points' cones, sampled on a regular grid t:

    .. math:: K_c(t) = \sum_p w_{c,p} \max(0,\; 1 - \lVert t - x_p \rVert_1 / r_p)

    In 2-D the first coordinate points right and the second up, so that entry (i, j) is K(t_j, -t_i) with t = `grid`. In
    1-D entry n is K(t_n). Differentiable in coords, radius and weight.

    Args:
        coords: Positions of the points, (G, P, D), in [-1, 1].
        radius: Reach of the points in the same unit, (G, P), positive.
        weight: Height of the points in every channel, (G, C, P).
        size: Number of samples of every axis, (K,) or (K rows, K columns).
        average: Divide each entry by the number of points that reach it plus 1e-6, as the CIFAR and sequence networks
            do; the ImageNet networks do not.

    Returns:
        (G, C, *size), computed and returned in float32, or in float64 where an input is float64, under autocast too.

    Raises:
        ValueError: A shape, a size or a radius breaks the rules above.
    """
    size = _check_size(size)
    if coords.ndim != 3 or coords.shape[-1] != len(size):
        raise ValueError(
            f'coords must be (G, P, D) with D = {len(size)}, the length of size {tuple(size)}, '
            f'got shape {tuple(coords.shape)}')
    if radius.shape != coords.shape[:2]:
        raise ValueError(
            f'radius must be (G, P) = {tuple(coords.shape[:2])} as coords, got shape {tuple(radius.shape)}')
    if weight.ndim != 3 or weight.shape[0] != coords.shape[0] or weight.shape[2] != coords.shape[1]:
        raise ValueError(
            f'weight must be (G, C, P) with G, P = {tuple(coords.shape[:2])} as coords, '
            f'got shape {tuple(weight.shape)}')
    # The value itself cannot be looked at while a graph is captured.
    if not torch.compiler.is_compiling() and radius.device.type != 'meta' and not bool((radius > 0).all()):
        raise ValueError(f'radius must be positive everywhere, got a minimum of {radius.detach().min().item()}')
    return _render_in_float(coords, radius, weight, size, average)


def _check_size(size: Sequence[int]) -> List[int]:
    if isinstance(size, int) or len(size) not in (1, 2) or min(size) < 1:
        raise ValueError(f'size must be one or two positive integers, (K,) or (K, K), got {size!r}')
    return [int(s) for s in size]


# Optimizers find the radii here: a parameter itself keeps no mark through deep copies and
# `load_state_dict(assign=True)`.
_kernels: 'WeakSet[SMPKernel]' = WeakSet()


def live_kernels() -> Iterator['SMPKernel']:
    """All `SMPKernel` modules there are at this moment."""
    return iter(list(_kernels))


class SMPKernel(nn.Module):
    """Points that are rendered to a convolution kernel, with the start values of the paper.

    Positions and radii stay float32 in a half precision model (`.half()`, `.to(torch.bfloat16)`, `dtype=`): eight bits
    cannot tell two neighbouring samples of a 51-wide kernel apart from the point between them.

    The radii stay in `RADIUS_RANGE`: every forward in training mode first puts them back, and so does `eval()` after
    training. An optimizer step, an average of the weights (which sees what the step left) and the projection thus
    follow each other as in the authors' loop. A copy, such as an average, is left as it is until it is trained itself.

    Args:
        channels: Channels C that share the points of a group.
        size: Kernel size, (K,) or (K rows, K columns).
        points: Points P of a group.
        groups: Groups G, each with points of its own.
        average: See `render_kernel`.
        radius: Start value of all radii, positive; by default (2 / K) * D (appendix, 1.1) with the smallest K above 1,
            and at most 1. From K = 3 on a point lies in reach of a sample wherever it starts.
        coords_std: Standard deviation of the truncated normal in [-1, 1] from which positions start; the paper takes
            0.2 for ImageNet and 0.05 for CIFAR-10.

    Attributes:
        coords: (G, P, D).
        radius: (G, P).
        weight: (G, C, P).
    """
    RADIUS_RANGE: Tuple[float, float] = (1e-3, 1.)  # the authors' limits, smp_imagenet/models/SMPConv.py:radius_clip

    def __init__(
            self,
            channels: int,
            size: Sequence[int],
            points: int,
            groups: int = 1,
            average: bool = False,
            radius: Optional[float] = None,
            coords_std: float = 0.2,
            device=None,
            dtype=None,
    ):
        super().__init__()
        self.size = _check_size(size)
        for name, value in (('channels', channels), ('points', points), ('groups', groups)):
            if value < 1:
                raise ValueError(f'{name} must be at least 1, got {value}')
        if radius is not None and not radius > 0:
            raise ValueError(f'radius must be positive, got {radius}')
        if not coords_std > 0:
            raise ValueError(f'coords_std must be positive, got {coords_std}')
        dimensions = len(self.size)
        if radius is None:
            radius = min(1., 2 * dimensions / min((k for k in self.size if k > 1), default=1))
        self.average = average
        self._trained = False
        self.init_radius = radius
        self.coords_std = coords_std

        position_dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.coords = nn.Parameter(torch.empty(groups, points, dimensions, device=device, dtype=position_dtype))
        self.radius = nn.Parameter(torch.empty(groups, points, device=device, dtype=position_dtype))
        self.weight = nn.Parameter(torch.empty(groups, channels, points, device=device, dtype=dtype))
        self.reset_parameters()
        _kernels.add(self)

    def __setstate__(self, state):
        super().__setstate__(state)
        self._trained = False
        _kernels.add(self)

    def reset_parameters(self) -> None:
        """Set the parameters to their start values."""
        nn.init.trunc_normal_(self.coords, std=self.coords_std, a=-1., b=1.)
        nn.init.constant_(self.radius, self.init_radius)
        nn.init.trunc_normal_(self.weight, std=0.02)

    @torch.no_grad()
    def clip_radius_(self) -> None:
        """Put the radii back into `RADIUS_RANGE`, in place, as training does by itself."""
        self.radius.clamp_(*self.RADIUS_RANGE)

    def forward(self) -> torch.Tensor:
        """Render the kernel, (G, C, *size), in float32 at least."""
        if self.training and not torch.jit.is_scripting():
            self._follow_training()
        return _render_in_float(self.coords, self.radius, self.weight, self.size, self.average)

    def train(self, mode: bool = True):
        if self._trained and self.training and not mode:
            self.clip_radius_()
        return super().train(mode)

    @torch.jit.unused
    def _follow_training(self) -> None:
        if torch.jit.is_tracing() or (torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()):
            return  # a graph that leaves PyTorch changes no parameter
        if not self._trained:
            self._trained = True
        _project(self.radius, *self.RADIUS_RANGE)

    def _apply(self, fn, recurse=True):
        half = (torch.float16, torch.bfloat16)
        before = {}
        for name in ('coords', 'radius'):
            param = getattr(self, name)
            before[name] = (param.detach(), None if param.grad is None else param.grad.detach())
        super()._apply(fn, recurse)
        for name, (value, grad) in before.items():
            param = getattr(self, name)
            if param.dtype in half and value.dtype not in half:
                param.grad = None
                param.data = value.to(param.device)
                param.grad = None if grad is None else grad.to(param.device)
        return self

    def extra_repr(self) -> str:
        groups, channels, points = self.weight.shape
        return f'{channels}, size={tuple(self.size)}, points={points}, groups={groups}, average={self.average}'
