"""Rendering of convolution kernels from points.

Shapes: G groups of points, C channels sharing a group's points, P points, D dimensions (1 or 2), K samples of an axis.
Coordinates live in [-1, 1].

Source: Kim and Park, "SMPConv: Self-moving Point Representations for Continuous Convolution", CVPR 2023,
https://arxiv.org/abs/2304.02330, and the authors' `smp_imagenet/models/SMPConv.py` and `smp/ckconv/nn/ck/smpkernel.py`.
"""
import math
import operator
from typing import Callable, List, Optional, Sequence

import torch
import torch.fx
import torch.nn.functional as F

__all__ = ['check_size', 'crop_unreached', 'grid', 'nearest_in_range', 'render_in_float', 'render_kernel']


def grid(size: int, device: Optional[torch.device] = None, dtype: Optional[torch.dtype] = None) -> torch.Tensor:
    """Positions of the `size` samples of one axis: evenly spaced from -1 to 1, and 0 for a single sample.

    Returns:
        (K,)

    Example:
        >>> grid(5)
        tensor([-1.0000, -0.5000,  0.0000,  0.5000,  1.0000])
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
    """`render_kernel` for inputs in its working precision, outside autocast."""
    if not torch.jit.is_scripting() and len(size) == 1:
        window = _window(radius, size[0])
        if window is not None and 2 * window * weight.shape[1] < size[0]:
            return _render_windows(coords, radius, weight, size[0], average, window)
    reach = radius.unsqueeze(-1)  # (G, P, 1)
    if len(size) == 1:
        x = _distance(coords, size[0])  # (G, P, K)
    else:
        x = (coords[..., 0].unsqueeze(-1) - grid(size[1], coords.device, coords.dtype)).abs()  # to the right
        y = (coords[..., 1].unsqueeze(-1) + grid(size[0], coords.device, coords.dtype)).abs()  # upwards
        x = x.unsqueeze(-2) + y.unsqueeze(-1)  # (G, P, K, K)
        reach = reach.unsqueeze(-1)
    basis = F.relu(1 - x / reach)  # (G, P, *size)
    if average:
        basis = basis / ((basis > 0).sum(1, keepdim=True, dtype=basis.dtype) + 1e-6)
    kernel = torch.matmul(weight, basis.flatten(2))  # (G, C, prod(size))
    return kernel.reshape(list(weight.shape[:2]) + size)  # (G, C, *size)


def _distance(coords: torch.Tensor, size: int, index: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Distances |x_p - t_n| of points, (G, P, 1), from all samples of an axis, (G, P, K), or from those of an index.

    Positions of samples are in two parts, since a float32 near 1 is rounded by 3e-8: not small beside a radius of
    0.0002.
    """
    device = None if coords.device.type == 'mps' else coords.device  # without float64
    exact = grid(size, device, torch.float64)
    near = exact.to(coords.dtype)
    rest = (exact - near).to(coords.dtype)
    near, rest = near.to(coords.device), rest.to(coords.device)
    if index is not None:
        near, rest = near[index], rest[index]
    return (coords - near - rest).abs()


def _window(radius: torch.Tensor, size: int) -> Optional[int]:
    """The most samples of `size` that a point of any of these radii reaches; None if the radii are unknown."""
    largest = _known(radius, torch.max) if _is_worth_reading(radius, size) else None
    if largest is None or not math.isfinite(largest):
        return None
    return min(size, math.floor(largest * (size - 1)) + 3)  # one more at each end for rounding


def _render_windows(
        coords: torch.Tensor,
        radius: torch.Tensor,
        weight: torch.Tensor,
        size: int,
        average: bool,
        window: int,
) -> torch.Tensor:
    """`_render` in 1-D from the `window` samples W around each point, without a (G, P, K) tensor.

    30 groups and channels, 30 points of radius 0.0002, 16,000 samples: 3 of them are not zero.
    """
    # Not under no_grad(), which torch.export would keep as an operator of its own.
    first = ((coords.detach()[..., 0] - radius.detach() + 1) * ((size - 1) / 2)).floor().long()  # (G, P)
    index = first.clamp(0, size - window).unsqueeze(-1) + torch.arange(window, device=coords.device)  # (G, P, W)
    basis = F.relu(1 - _distance(coords, size, index) / radius.unsqueeze(-1))  # (G, P, W)
    index = index.flatten(1)  # (G, P * W)
    if average:
        reached = (basis > 0).flatten(1).to(basis.dtype)
        count = reached.new_zeros(len(reached), size).scatter_add(1, index, reached)  # (G, K)
        basis = basis / (count.gather(1, index) + 1e-6).view_as(basis)
    terms = (weight.unsqueeze(-1) * basis.unsqueeze(1)).flatten(2)  # (G, C, P * W)
    return terms.new_zeros(*terms.shape[:2], size).scatter_add(2, index.unsqueeze(1).expand_as(terms), terms)


@torch.fx.wrap
def crop_unreached(kernel: torch.Tensor, coords: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """The end of a 1-D kernel, (G, C, K'), from just before the first sample that a point reaches: zeros are cropped.

    The points of causal kernels gather at the current sample, the last one. At the start 30 × 30 points reach a third
    of the samples. The whole kernel where values are unknown, as in a captured graph.

    Args:
        kernel: (G, C, K).
        coords: (G, P, 1).
        radius: (G, P), in range.
    """
    if torch.jit.is_scripting():
        return kernel
    oldest = None
    if _is_worth_reading(radius, kernel.shape[2]):
        oldest = _known(coords.detach()[..., 0] - radius.detach(), torch.min)
    if oldest is None or not math.isfinite(oldest):
        return kernel
    last = kernel.shape[2] - 1
    return kernel[..., min(max(math.floor((oldest + 1) * last / 2) - 1, 0), last):]


def _is_worth_reading(radius: torch.Tensor, size: int) -> bool:
    """Whether to read values to save work. Other devices than CPUs make the program wait: for large kernels only."""
    return not torch.jit.is_tracing() and (radius.device.type == 'cpu' or radius.numel() * size > 2 ** 22)


def _known(x: torch.Tensor, limit: Callable[[torch.Tensor], torch.Tensor]) -> Optional[float]:
    """The least or largest value of x; None if there is none, or it is unknown: in a captured graph, under `vmap`."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.is_meta or x.numel() == 0 or (
            x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    try:
        return limit(x.detach()).item()
    except RuntimeError:  # how `vmap` and fake tensors say that they have no values
        return None


@torch.fx.wrap
def render_in_float(
        coords: torch.Tensor,
        radius: torch.Tensor,
        weight: torch.Tensor,
        size: List[int],
        average: bool,
) -> torch.Tensor:
    """`render_kernel` without its checks, for the forward pass of modules; one node in an FX graph."""
    dtype = torch.float32
    if coords.dtype == torch.float64 or radius.dtype == torch.float64 or weight.dtype == torch.float64:
        dtype = torch.float64
    if torch.jit.is_scripting():  # TorchScript cannot leave autocast, which ignores float64
        kernel = _render(coords.double(), radius.double(), weight.double(), size, average)
        return kernel.to(dtype)
    coords, radius, weight = coords.to(dtype), radius.to(dtype), weight.to(dtype)
    device_type = weight.device.type
    if device_type != 'meta' and torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return _render(coords, radius, weight, size, average)
    return _render(coords, radius, weight, size, average)


def nearest_in_range(radius: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """The nearest radius in [low, high], with the gradient of the identity: a clamp would trap a radius outside."""
    value = radius.detach()
    return value.clamp(low, high) + (radius - value)


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
        radius: Reach of the points in the same unit, (G, P), positive. This function has no range of its own:
            `SMPKernel` passes the nearest radius in its `radius_range`.
        weight: Height of the points in every channel, (G, C, P).
        size: Number of samples of every axis, (K,) or (K rows, K columns).
        average: Divide each entry by the number of points that reach it plus 1e-6, as the CIFAR and sequence networks
            do; the ImageNet networks do not.

    Returns:
        (G, C, *size), computed and returned in float32, or in float64 if an input is float64, also under autocast.

    Raises:
        ValueError: A shape, a dtype, a size or a radius breaks the rules above.

    Example:
        One point in the middle of a 3×3 kernel reaches its four neighbours:

        >>> render_kernel(torch.zeros(1, 1, 2), torch.full((1, 1), 2.), torch.ones(1, 1, 1), (3, 3))
        tensor([[[[0.0000, 0.5000, 0.0000],
                  [0.5000, 1.0000, 0.5000],
                  [0.0000, 0.5000, 0.0000]]]])
    """
    size = check_size(size)
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
    for name, value in (('coords', coords), ('radius', radius), ('weight', weight)):
        if not value.is_floating_point():
            raise ValueError(f'{name} must be floating-point, got {value.dtype}')
    least = _known(radius, torch.min)
    if least is not None and not least > 0:
        raise ValueError(f'radius must be positive everywhere, got a minimum of {least}')
    return render_in_float(coords, radius, weight, size, average)


def check_size(size: Sequence[int]) -> List[int]:
    try:
        checked = [operator.index(s) for s in size]
    except TypeError:
        checked = []
    if len(checked) not in (1, 2) or min(checked) < 1:
        raise ValueError(f'size must be one or two positive integers, (K,) or (K, K), got {size!r}')
    return checked
