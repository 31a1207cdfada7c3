"""Timing that survives a noisy machine: candidates take turns, each figure is the median of its own rounds."""
import statistics
import time
from typing import Callable, Dict

import torch

from timm_smpconv.tools.backend_report import machine as machine


def paired(
        candidates: Dict[str, Callable[[], object]],
        rounds: int,
        warmup: int = 2,
        settle: bool = True,
) -> Dict[str, float]:
    """Milliseconds of each candidate, medians over `rounds` in which every candidate is timed once.

    With `settle` it runs once untimed before: what ran before it, and memory it has to fetch from the system again,
    then do not count, as in a loop of nothing else.
    """
    for _ in range(warmup):
        for run in candidates.values():
            run()
    times = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            if settle:
                run()
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest expected magnitude."""
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def agree(what: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> float:
    """The difference, or the end of the benchmark where it is too large: no time is worth a wrong result."""
    found = difference(actual, expected)
    if not found <= tolerance:
        raise SystemExit(f'{what} differs by {found:.1e} relative, more than {tolerance:.0e}: nothing is reported')
    return found
