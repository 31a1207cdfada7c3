"""The SMP kernel: a convolution kernel rendered from points that move during training.

Shapes: G groups of points, C channels sharing a group's points, P points, D dimensions (1 or 2), K samples of an axis.
Coordinates live in [-1, 1].

Source: Kim and Park, "SMPConv: Self-moving Point Representations for Continuous Convolution", CVPR 2023,
https://arxiv.org/abs/2304.02330, and the authors' `smp_imagenet/models/SMPConv.py` and `smp/ckconv/nn/ck/smpkernel.py`.
"""
import math
from typing import Any, Dict, List, Optional, Sequence, Tuple
from weakref import WeakValueDictionary

import torch
import torch.fx
import torch.nn as nn

from ..ops.render import check_size, nearest_in_range, render_in_float
from ._checks import check_points

__all__ = ['SMPKernel', 'live_kernels']

torch.fx.wrap('render_in_float')  # FX wraps a function in one module at a time

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
        trained_size: The size it was built with, to which `weight` belongs.
        scale: Factor on the entries at `size`, 1 at `trained_size`; see `resize`.

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
        self.size = check_size(size)
        self.trained_size = list(self.size)
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
        radius = nearest_in_range(self.radius, self.radius_range[0], self.radius_range[1])
        kernel = render_in_float(self.coords, radius, self.weight, self.size, self.average)
        return kernel if self.scale == 1 else kernel * self.scale

    def resize(self, size: Sequence[int]) -> 'SMPKernel':
        r"""Render at another size from now on, scaled so that the continuous convolution stays what it was.

        A kernel is a function K on [-1, 1]^D. Its samples lie h = 2 / (size - 1) apart, and the convolution of a map
        that is sampled as densely approximates an integral by a Riemann sum:

        .. math:: \int K(u)\, x(t - u)\, du \;\approx\; h^D \sum_n K(t_n)\, x(t - t_n)

        A network knows the sum, without :math:`h^D`. A grid of another spacing h' would multiply it by about
        :math:`(h / h')^D`, so the entries are multiplied by :math:`(h' / h)^D`: in 2-D by
        :math:`((K - 1) / (K' - 1))^2` from a trained size of K to K'. This keeps the integral, which is the response to
        a constant map, and with it the mean and variance that a BatchNorm behind the convolution has learned. In a
        whole network small differences add up: take its statistics anew (docs/kernel-size.md).

        It is kept as closely as a sum approximates an integral: well for points that reach over several samples, less
        so on coarse grids. A point of a radius below the spacing may fall between the samples and vanish.

        Parameters do not change, so the state dict fits a kernel of any size. It always describes the kernel at
        `trained_size`, also after training at another size.

        Args:
            size: As many axes as before, each at least 2; an axis of trained size 1, which has no spacing, stays 1.

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
        size = check_size(size)
        if len(size) != len(self.trained_size) or any(
                (k == 1) != (trained == 1) for k, trained in zip(size, self.trained_size)):
            raise ValueError(
                f'size must be at least 2 on each axis, and 1 where the trained size {tuple(self.trained_size)} is 1, '
                f'got {tuple(size)}')
        self.size = size
        self.scale = math.prod((trained - 1) / (k - 1) for k, trained in zip(size, self.trained_size) if k > 1)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Load as PyTorch does, unless a position or radius is not finite."""
        try:
            for name in ('coords', 'radius'):
                if isinstance(state_dict.get(prefix + name), torch.Tensor):
                    check_points(prefix + name, state_dict[prefix + name])
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
        trained = '' if self.size == self.trained_size else f', trained_size={tuple(self.trained_size)}'
        return (
            f'{channels}, size={tuple(self.size)}, points={points}, groups={groups}, average={self.average}{trained}')
