"""The backend that is expected to be the fastest, by the geometry of a convolution alone."""
from functools import lru_cache
from typing import Any, Sequence

import torch

from . import costs, cpu
from .geometry import Geometry

__all__ = ['choose', 'choose_over_channels']


def choose(g: Geometry, transform: bool = True, is_transformed: bool = False) -> str:
    """The backend that is expected to be the fastest for a pass; 'native' where that is not the CPU's.

    Args:
        g: The pass.
        transform: Whether 'fft' is allowed.
        is_transformed: Whether the transform of the input (or, for its gradient, of the output's) is there already.
    """
    if g.device != 'cpu':
        return 'native'
    return _choose(g, transform, is_transformed, cpu.HERE, torch.get_num_threads(), bool(torch.backends.mkldnn.enabled))


# A convolution leaves the processor's caches without this package's code: counting operations anew takes 35 µs.
@lru_cache(4096)
def _choose(g: Geometry, transform: bool, is_transformed: bool, *machine: Any) -> str:
    """Choose on a machine: the CPU, the number of threads, and whether oneDNN is on. `costs` asks for them itself."""
    g = g.cropped()
    if g.kh * g.kw <= 9 or min(g.kh, g.kw) == 1:
        return 'native'
    times = costs.expected(g, is_transformed)
    if not transform:
        del times['fft']
    return min(times, key=times.__getitem__)


def forget() -> None:
    """Choose anew: for tests that replace `costs.expected`."""
    _choose.cache_clear()


def choose_over_channels(
        x: torch.Tensor,
        weight: torch.Tensor,
        before: Sequence[int],
        groups: int,
        keeps: bool,
) -> str:
    """'fft' or 'native', whichever is expected to take less time for a convolution over channels and its gradients.

    Args:
        x: (B, I, *L).
        weight: (O, I / groups, *K), without taps that meet nothing but padding.
        before: Zeros in front of x, for each dimension.
        groups: Of the channels.
        keeps: Whether the kernel's transform is there already.
    """
    times = costs.expected_over_channels(x.shape, weight.shape, before, groups, keeps, x.device.type == 'cpu')
    return 'fft' if times['fft'] < times['native'] else 'native'
