"""How outputs of a file are compared with those of the network as it was given.

Shapes: N inputs, B batch, K classes, H and W height and width.
"""
from typing import List, NamedTuple, Optional

import torch

from .network import Outputs, Run

__all__ = ['LIMITS', 'Found', 'classes', 'compare', 'hits', 'outputs', 'wrong']

# The largest difference of outputs, relative to the largest output: rounding to bfloat16 makes up to 5e-2 of it.
LIMITS = {'bfloat16': 0.2, 'int8': 0.5}
_TINY = torch.finfo(torch.float32).tiny  # outputs may all be zero, as those of an untrained head
SAME = 99.9  # the least percentage of inputs of the same class in float32: a tie in a thousand may be broken otherwise


class Found(NamedTuple):
    """What a comparison found.

    Attributes:
        off: The largest difference, relative to the largest output, of the tensor in which it is largest.
        same: The percentage of inputs, or pixels, of the same class.
        top1: The percentage of inputs of the right class.
        drop: How much lower that is than the reference's; without labels, the percentage not of the same class.
    """
    off: float
    same: Optional[float]
    top1: Optional[float]
    drop: float


def outputs(run: Run, x: torch.Tensor, batch: int) -> Outputs:
    """What a function for batches of one size returns for all inputs. The last batch is filled with the first ones."""
    filled = x[torch.arange(-(-len(x) // batch) * batch) % len(x)]
    return tuple(torch.cat(parts)[:len(x)] for parts in zip(*map(run, filled.split(batch))))


def classes(outputs: Outputs, task: str) -> Optional[torch.Tensor]:
    """The class of each input (N,), or of each pixel (N, H, W). One map alone is that of a class against no class."""
    if task == 'features':
        return None
    scores = outputs[0]
    return scores[:, 0] > 0 if scores.shape[1] == 1 else scores.argmax(1)


def hits(outputs: Outputs, labels: Optional[torch.Tensor], task: str) -> Optional[float]:
    """The percentage of inputs, or pixels, of the right class. None for features, or without labels."""
    found = classes(outputs, task)
    return None if labels is None or found is None else _percentage(found == labels)


def compare(actual: Outputs, expected: Outputs, labels: Optional[torch.Tensor], task: str) -> Found:
    """Compare outputs with those of the reference.

    Raises:
        ValueError: They have other shapes.
    """
    shapes = [[tuple(t.shape) for t in found] for found in (actual, expected)]
    if shapes[0] != shapes[1]:
        raise ValueError(f'outputs must be of shape {shapes[1]}, got {shapes[0]}')
    off = max(
        ((a - e).abs().max() / e.abs().max().clamp(min=_TINY)).nan_to_num(torch.inf).item()
        for a, e in zip(actual, expected))
    found, reference = classes(actual, task), classes(expected, task)
    same = None if found is None or reference is None else _percentage(found == reference)
    top1, before = (hits(outputs, labels, task) for outputs in (actual, expected))
    drop = before - top1 if top1 is not None and before is not None else 100 - same if same is not None else 0.
    return Found(off, same, top1, drop)


def wrong(found: Found, precision: str, own: bool, tolerance: float, max_drop: float) -> Optional[str]:
    """Why a file must not be used, None if it may.

    Classes in less than float32 count on the user's images only: those of noise are a matter of chance.
    """
    limit = LIMITS.get(precision, tolerance)
    reasons: List[str] = []
    if not found.off <= limit and (precision != 'int8' or found.same is None):  # of int8, classes say more
        reasons.append(f'outputs differ by {found.off:.1e} of the largest, more than {limit:g}')
    if precision == 'float32' and found.same is not None and found.same < SAME:
        reasons.append(f'{found.same:.1f} % of the classes are the same, not {SAME} %')
    if precision != 'float32' and own and found.drop > max_drop:
        what = 'classes that are the same' if found.top1 is None else 'top-1'
        reasons.append(f'{what}: {found.drop:.2f} percent lost, more than --max-drop {max_drop:g}')
    return '; '.join(reasons) or None


def _percentage(right: torch.Tensor) -> float:
    return 100 * right.double().mean().item()
