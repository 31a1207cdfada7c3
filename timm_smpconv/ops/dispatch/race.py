"""Under `torch.backends.cudnn.benchmark`, the first call of a shape on a GPU times the backends.

Later calls run the fastest one. As with cuDNN's own benchmark, results of another process may come from another
backend. Where they must not differ, ask for deterministic algorithms. The ranks of a distributed run time for
themselves.
"""
import logging
from collections import Counter
from functools import partial
from typing import Counter as CounterType, Tuple

import torch

from ..backends import BACKENDS, Backend
from .geometry import Geometry
from .kept import Kept

__all__ = ['fastest', 'is_on']

_logger = logging.getLogger(__name__)

MOST = 64  # shapes of one case that are timed; others are 'native'
_kept = Kept()
_shapes: CounterType[Geometry] = Counter()  # timed, by the case: all but batch, height and width


def is_on(x: torch.Tensor) -> bool:
    """Whether a convolution of x may be computed by whatever backend is the fastest, and timed to find out."""
    return x.is_cuda and _is_switched_on()


@torch.compiler.assume_constant_result
def _is_switched_on() -> bool:
    deterministic = torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    return torch.backends.cudnn.benchmark and not deterministic


def fastest(g: Geometry, args: Tuple) -> str:
    """The name of the fastest backend: timed at the first call of a pass, remembered for the next ones.

    'native' while a CUDA graph is captured, unless it was timed before, and for more shapes of one case than `MOST`.

    Args:
        g: The pass.
        args: Of `Backend.compute`.
    """
    name, case = _kept.fastest(g), g._replace(b=0, h=0, w=0)
    if name is not None:
        return name
    if _shapes[case] >= MOST or torch.cuda.is_current_stream_capturing():
        return 'native'
    candidates = {
        name: partial(_computed, backend, g, args)
        for name, backend in BACKENDS.items() if backend.unsupported(args[0]) is None}
    with torch.no_grad():
        times = _kept.measure(g, candidates, candidates['native'](), g.dtype, str(g))
    if times:
        _shapes[case] += 1
        torch.cuda.empty_cache()  # as PyTorch does after its own: the losers may have taken gigabytes
        _logger.info('%s: ms %s', g, ', '.join(f'{name} {ms:.3g}' for name, ms in times.items()))
    return _kept.fastest(g) or 'native'


def _computed(backend: Backend, g: Geometry, args: Tuple) -> torch.Tensor:
    return g.finish(backend.compute(g.what, args), g.dtype)
