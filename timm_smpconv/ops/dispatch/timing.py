"""How the package times things: candidates take turns, and each has the median of its own times."""
import logging
import math
import statistics
import time
from typing import Callable, Dict, List, Mapping, Optional

import torch

__all__ = ['agreeing', 'timing']

_logger = logging.getLogger(__name__)
_clock = time.perf_counter
# A warm-up ends after so many seconds. oneDNN compiles for milliseconds in the first two calls: the weight gradient of
# C 768, 7×7, 5×5 takes 13.2, 6.8, 2.1, 1.8 ms, then 1.5.
_WARM = 0.2
_FEWEST = 3  # rounds, even where they take longer than they should

Run = Callable[[], object]


def timing(
        candidates: Mapping[str, Run],
        rounds: int = 5,
        warmup: int = 2,
        settle: bool = True,
        slow: float = math.inf,
        seconds: float = math.inf,
        clock: Optional[Callable[[], float]] = None,
) -> Dict[str, float]:
    """Milliseconds of each candidate, medians over rounds in which every candidate is timed once.

    Args:
        candidates: Functions by name. Work that they start on the current CUDA device is waited for.
        rounds: Of timing.
        warmup: Calls of a candidate before that, or as many as take 0.2 s.
        settle: Whether a candidate runs once untimed before it is timed: what ran before it, and memory that it has to
            fetch from the system again, then do not count, as in a loop of nothing else.
        slow: A candidate that takes more than so many times as long as the fastest one once it is warm has no part in
            the rounds. What it took then is returned.
        seconds: After which no other round starts, if there were three.
        clock: Returns seconds, those of `time.perf_counter` by default.
    """
    clock = clock or _clock
    warm: Dict[str, float] = {}
    for name, run in candidates.items():
        calls: List[float] = []
        while len(calls) < warmup and sum(calls) < _WARM:
            calls.append(_time(run, clock))
        warm[name] = min(calls, default=0.)
    limit = slow * min(warm.values(), default=0.) if slow < math.inf else math.inf
    times: Dict[str, List[float]] = {name: [] if warm[name] <= limit else [warm[name]] for name in candidates}
    running = [name for name in candidates if not times[name]]
    start = clock()
    for i in range(rounds):
        if i >= _FEWEST and clock() - start > seconds:
            break
        for name in running:
            if settle:
                candidates[name]()
            times[name].append(_time(candidates[name], clock))
    return {name: 1e3 * statistics.median(found) for name, found in times.items()}


def _time(run: Run, clock: Callable[[], float]) -> float:
    _wait()
    start = clock()
    run()
    _wait()
    return clock() - start


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def agreeing(
        candidates: Mapping[str, Callable[[], torch.Tensor]],
        expected: torch.Tensor,
        limit: float,
        what: str,
) -> Dict[str, Callable[[], torch.Tensor]]:
    """The candidates that run and whose result differs from the expected one by at most the limit.

    The others are named in the log.
    """
    found = {}
    for name, run in candidates.items():
        try:
            error = (run() - expected).abs().amax().item()
        except Exception as failure:  # compilers and libraries raise anything
            _logger.warning('%s is left out for %s: %s', name, what, failure)
            continue
        if error <= limit:  # false for NaN
            found[name] = run
        else:
            _logger.warning('%s is left out for %s: it differs from F.conv2d by %.3g', name, what, error)
    return found
