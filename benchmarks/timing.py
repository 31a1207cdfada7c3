"""What the benchmarks share: timing in which candidates take turns, and the end of one whose results are wrong."""
import torch

from timm_smpconv.ops.dispatch.timing import timing as paired  # noqa: F401
from timm_smpconv.tools.backend_report import machine as machine


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest expected magnitude."""
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def agree(what: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> float:
    """The difference, or the end of the benchmark where it is too large: no time is worth a wrong result."""
    found = difference(actual, expected)
    if not found <= tolerance:
        raise SystemExit(f'{what} differs by {found:.1e} relative, more than {tolerance:.0e}: nothing is reported')
    return found
