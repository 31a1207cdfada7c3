"""What an SMP kernel is: a convolution kernel rendered from points that move during training.

Shapes: G groups of points, C channels sharing a group's points, P points, D dimensions (1 or 2), K samples of an axis.
Coordinates live in [-1, 1].

Source: Kim and Park, "SMPConv: Self-moving Point Representations for Continuous Convolution", CVPR 2023,
https://arxiv.org/abs/2304.02330, and the authors' `smp_imagenet/models/SMPConv.py` and `smp/ckconv/nn/ck/smpkernel.py`.
"""
import math
import operator
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple
from weakref import WeakValueDictionary

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ['SMPKernel', 'crop_unreached', 'grid', 'render_kernel']


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
def _render_in_float(
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


def _nearest_in_range(radius: torch.Tensor, low: float, high: float) -> torch.Tensor:
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
    for name, value in (('coords', coords), ('radius', radius), ('weight', weight)):
        if not value.is_floating_point():
            raise ValueError(f'{name} must be floating-point, got {value.dtype}')
    least = _known(radius, torch.min)
    if least is not None and not least > 0:
        raise ValueError(f'radius must be positive everywhere, got a minimum of {least}')
    return _render_in_float(coords, radius, weight, size, average)


def _check_size(size: Sequence[int]) -> List[int]:
    try:
        checked = [operator.index(s) for s in size]
    except TypeError:
        checked = []
    if len(checked) not in (1, 2) or min(checked) < 1:
        raise ValueError(f'size must be one or two positive integers, (K,) or (K, K), got {size!r}')
    return checked


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
    _check_dense(name, tensor)
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


def _check_dense(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point() or tensor.layout is not torch.strided:
        raise ValueError(f'{name} must be a dense floating-point tensor, got {tensor.dtype}, {tensor.layout}')


# Where optimizers that are given bare parameters look for points: attributes of a parameter are lost in deep copies, in
# `load_state_dict(assign=True)` and in `fully_shard`.
_kernels: 'WeakValueDictionary[int, SMPKernel]' = WeakValueDictionary()


def live_kernels() -> List['SMPKernel']:
    """All `SMPKernel` modules that exist at this moment.

    Safe while another thread builds or drops modules: `valuerefs` copies in one step, where iterating over a weak set
    or dictionary fails if its size changes.
    """
    return [kernel for kernel in (ref() for ref in _kernels.valuerefs()) if kernel is not None]


class SMPKernel(nn.Module):
    """Points that are rendered to a convolution kernel, with the initial values of the paper.

    Rendering is a pure function in every mode. A radius outside `radius_range` is rendered as the nearest one inside,
    and its gradient is the one at that radius. The optimizer moves such a radius back into the range after each step:
    `SMPAdamW` and `SMPAdam`, or any other after `timm_smpconv.optim.add_point_rules`.

    Positions and radii stay at least float32 in a model of lower precision (`.half()`, `.to(torch.bfloat16)`,
    `dtype=`): eight bits cannot tell two neighbouring samples of a 51-wide kernel apart from the point between them.

    Loading a state dict with NaN or infinity in `coords` or `radius` fails and leaves this kernel unchanged. Radii
    outside the range load.

    Args:
        channels: Channels C that share the points of a group.
        size: Kernel size, (K,) or (K rows, K columns).
        points: Points P of a group.
        groups: Groups G, each with points of its own.
        average: See `render_kernel`.
        radius: Initial value of all radii, in radius_range; by default (2 / K) * D (appendix, 1.1) with the smallest K
            above 1, or the nearest value in radius_range. From K = 3 on, a point reaches a sample wherever it starts.
        coords_mean: Mean of the truncated normal in [-1, 1] from which positions are drawn: 0, and 1 for the causal
            kernels of sequences, whose points gather at the current sample.
        coords_std: Its standard deviation. The paper uses 0.2 for ImageNet, 0.05 for CIFAR-10, and for sequences 0.1 in
            [-1, 0], which is stretched to [-1, 1]: 0.2.
        radius_range: Smallest and largest radius. The authors use (1e-3, 1) for ImageNet
            (`smp_imagenet/models/SMPConv.py`) and (1e-4, 1) for CIFAR-10 and sequences
            (`smp/ckconv/nn/ck/smpkernel.py`).

    Attributes:
        coords: (G, P, D).
        radius: (G, P).
        weight: (G, C, P).
        size: The size it is rendered at.
        native_size: The size it was built with, to which `weight` belongs.
        scale: Factor on the entries at `size`, 1 at `native_size`; see `resize`.

    Raises:
        ValueError: An argument breaks the rules above.

    Example:
        >>> kernel = SMPKernel(channels=8, size=(31, 31), points=240)
        >>> kernel().shape
        torch.Size([1, 8, 31, 31])
    """
    radius_range: Tuple[float, float]

    def __init__(
            self,
            channels: int,
            size: Sequence[int],
            points: int,
            groups: int = 1,
            average: bool = False,
            radius: Optional[float] = None,
            coords_mean: float = 0.,
            coords_std: float = 0.2,
            radius_range: Tuple[float, float] = (1e-3, 1.),
            device=None,
            dtype=None,
    ):
        super().__init__()
        self.size = _check_size(size)
        self.native_size = list(self.size)
        self.scale = 1.
        for name, value in (('channels', channels), ('points', points), ('groups', groups)):
            if value < 1:
                raise ValueError(f'{name} must be at least 1, got {value}')
        low, high = radius_range
        if not 0 < low <= high < math.inf:
            raise ValueError(f'radius_range must be two finite numbers, 0 < low <= high, got {radius_range}')
        if radius is None:
            radius = 2 * len(self.size) / min((k for k in self.size if k > 1), default=1)
            radius = min(max(radius, low), high)
        if not low <= radius <= high:
            raise ValueError(f'radius must be in radius_range {radius_range}, got {radius}')
        if not -1 <= coords_mean <= 1:
            raise ValueError(f'coords_mean must be in [-1, 1], got {coords_mean}')
        if not 0 < coords_std < math.inf:
            raise ValueError(f'coords_std must be positive and finite, got {coords_std}')
        self.average = average
        self.init_radius = radius
        self.coords_mean = coords_mean
        self.coords_std = coords_std
        self.radius_range = (low, high)

        position_dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.coords = nn.Parameter(torch.empty(groups, points, len(self.size), device=device, dtype=position_dtype))
        self.radius = nn.Parameter(torch.empty(groups, points, device=device, dtype=position_dtype))
        self.weight = nn.Parameter(torch.empty(groups, channels, points, device=device, dtype=dtype))
        self.reset_parameters()
        _kernels[id(self)] = self

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        _kernels[id(self)] = self

    def reset_parameters(self) -> None:
        """Set the parameters to their initial values."""
        nn.init.trunc_normal_(self.coords, self.coords_mean, self.coords_std, -1., 1.)
        nn.init.constant_(self.radius, self.init_radius)
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self) -> torch.Tensor:
        """Render the kernel, (G, C, *size), at least in float32."""
        radius = _nearest_in_range(self.radius, self.radius_range[0], self.radius_range[1])
        kernel = _render_in_float(self.coords, radius, self.weight, self.size, self.average)
        return kernel if self.scale == 1 else kernel * self.scale

    def resize(self, size: Sequence[int]) -> 'SMPKernel':
        r"""Render at another size from now on, scaled so that the continuous convolution stays what it was.

        A kernel is a function K on [-1, 1]^D. Its samples lie h = 2 / (size - 1) apart, and the convolution of a map
        that is sampled as densely approximates an integral by a Riemann sum:

        .. math:: \int K(u)\, x(t - u)\, du \;\approx\; h^D \sum_n K(t_n)\, x(t - t_n)

        A network knows the sum, without :math:`h^D`. A grid of another spacing h' would multiply it by about
        :math:`(h / h')^D`, so the entries are multiplied by :math:`(h' / h)^D`: in 2-D by
        :math:`((K - 1) / (K' - 1))^2` from a native size of K to K'. This keeps the integral, which is the response to
        a constant map, and with it the mean and variance that a BatchNorm behind the convolution has learned. In a
        whole network small differences add up: take its statistics anew (docs/kernel-size.md).

        It is kept as closely as a sum approximates an integral: well for points that reach over several samples, less
        so on coarse grids. A point of a radius below the spacing may fall between the samples and vanish.

        Parameters do not change, so the state dict fits a kernel of any size. It always describes the kernel at
        `native_size`, also after training at another size.

        Args:
            size: As many axes as before, each at least 2; an axis of native size 1, which has no spacing, stays 1.

        Returns:
            This module.

        Raises:
            ValueError: The size breaks these rules; nothing is changed.

        Example:
            >>> kernel = SMPKernel(channels=1, size=(31, 31), points=240)
            >>> weight = nn.init.ones_(kernel.weight)
            >>> before = kernel().sum()
            >>> kernel.resize((61, 61))().shape, kernel.scale
            (torch.Size([1, 1, 61, 61]), 0.25)
            >>> torch.allclose(kernel().sum(), before, rtol=0.01)
            True
        """
        size = _check_size(size)
        if len(size) != len(self.native_size) or any(
                (k == 1) != (native == 1) for k, native in zip(size, self.native_size)):
            raise ValueError(
                f'size must be at least 2 on each axis, and 1 where the native size {tuple(self.native_size)} is 1, '
                f'got {tuple(size)}')
        self.size = size
        self.scale = math.prod((native - 1) / (k - 1) for k, native in zip(size, self.native_size) if k > 1)
        return self

    def check_entry(self, name: str, key: str, value: torch.Tensor) -> None:
        """Raise a ValueError if this kernel must not load a value.

        Args:
            name: 'coords', 'radius' or 'weight'.
            key: What the error calls it.
            value: Of any shape.
        """
        (_check_dense if name == 'weight' else check_points)(key, value)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        try:
            for name in self._parameters:
                value = state_dict.get(prefix + name)
                if isinstance(value, torch.Tensor):
                    self.check_entry(name, prefix + name, value)
        except ValueError as error:
            error_msgs = args[-1]
            error_msgs.append(str(error))
        else:
            super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn, recurse=True):
        """Apply a change of device or precision, but keep positions and radii at least in float32."""
        weight = (self.weight, self.weight.grad)

        def apply(tensor):
            out = fn(tensor)
            if out.dtype.itemsize < 4 and not any(tensor is w for w in weight):
                return tensor.to(out.device, torch.float32)
            return out

        return super()._apply(apply, recurse)

    def extra_repr(self) -> str:
        groups, channels, points = self.weight.shape
        native = '' if self.size == self.native_size else f', native_size={tuple(self.native_size)}'
        return (
            f'{channels}, size={tuple(self.size)}, points={points}, groups={groups}, average={self.average}{native}')
