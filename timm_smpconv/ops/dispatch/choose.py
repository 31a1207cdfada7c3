"""The backend of a pass: the requested one, or the fastest that is accurate for its values and can run."""
import logging
from functools import lru_cache
from typing import Any, Optional, Sequence, Tuple

import torch

from ..backends import BACKENDS, fft
from . import costs, cpu, race
from .geometry import Geometry

__all__ = ['choose', 'choose_over_channels', 'expected_fastest']

_logger = logging.getLogger(__name__)


def choose(g: Geometry, requested: Optional[str], args: Tuple, is_transformed: bool = False) -> str:
    """The name of the backend for a pass.

    Args:
        g: The pass.
        requested: The requested backend.
        args: Of `Backend.compute`.
        is_transformed: See `expected_fastest`.

    Raises:
        ValueError: The requested backend cannot run.
    """
    x = args[0]
    if requested is not None:
        reason = BACKENDS[requested].unsupported(x)
        if reason is not None:
            raise ValueError(f'backend {requested!r} was requested and cannot run: {reason}')
        return requested
    if race.is_on(x):
        return race.fastest(g, args)
    name = expected_fastest(g, is_transformed=is_transformed)
    if name == 'fft' and not _is_accurate_by_fft(g.what, args):
        name = expected_fastest(g, transform=False)
    reason = BACKENDS[name].unsupported(x)
    if reason is None:
        return name
    _logger.debug('backend %s is skipped: %s', name, reason)
    return 'native'


def _is_accurate_by_fft(what: str, args: Tuple) -> bool:
    """Whether a transform is about as accurate as a direct convolution for these values."""
    if what == 'weight gradient':
        return fft.is_in_range(args[0], args[1])
    return fft.is_accurate(args[0], args[1] if what == 'output' else args[2])


def expected_fastest(g: Geometry, transform: bool = True, is_transformed: bool = False) -> str:
    """The backend that is expected to be the fastest by the geometry alone; 'native' where that is not the CPU's.

    Args:
        g: The pass.
        transform: Whether 'fft' is allowed.
        is_transformed: Whether the transform of the input (or, for its gradient, of the output's) is there already.
    """
    if g.device != 'cpu':
        return 'native'
    return _cached(g, transform, is_transformed, cpu.HERE, torch.get_num_threads(), bool(torch.backends.mkldnn.enabled))


# A convolution leaves the processor's caches without this package's code: counting operations anew takes 35 µs.
@lru_cache(4096)
def _cached(g: Geometry, transform: bool, is_transformed: bool, *machine: Any) -> str:
    """On a machine: the CPU, the number of threads, and whether oneDNN is on. `costs` asks for them itself."""
    g = g.cropped()
    if g.kh * g.kw <= 9 or min(g.kh, g.kw) == 1:
        return 'native'
    times = costs.expected(g, is_transformed)
    if not transform:
        del times['fft']
    return min(times, key=times.__getitem__)


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
