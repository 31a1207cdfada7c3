"""What is kept from one call to the next: what is derived from a weight, and which backend was the fastest."""
import math
from typing import Any, Callable, Dict, Hashable, Mapping, Optional, Tuple

import torch

from .. import _private
from .timing import agreeing, timing

__all__ = ['Kept']

# The largest difference of two backends, relative to the largest value.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Kept:
    """What is derived from one weight, for the last size of input: a copy in another format, or a transform.

    And for the calls that were measured, the fastest backend. It is copied and pickled empty.
    """

    def __init__(self):
        self._derived: Optional[Tuple[Any, Any, torch.Tensor]] = None
        self._fastest: Dict[Hashable, Tuple[str, float]] = {}

    def __reduce__(self):
        return Kept, ()

    def fastest(self, call: Hashable) -> Optional[str]:
        """The backend that was the fastest for such a call, None if it was not measured."""
        return self._fastest.get(call, (None, 0.))[0]

    @property
    def milliseconds(self) -> float:
        """What all measured calls take, each by its fastest backend."""
        return sum(time for _, time in self._fastest.values())

    def measure(
            self,
            call: Hashable,
            candidates: Mapping[str, Callable[[], torch.Tensor]],
            expected: torch.Tensor,
            dtype: torch.dtype,
            what: str,
    ) -> Dict[str, float]:
        """Time the candidates whose result is right, and keep the name of the fastest one for such calls.

        Args:
            call: All that the fastest backend depends on.
            candidates: Functions by the name of a backend.
            expected: The result. Nothing is measured if it cannot judge: if it holds NaN or infinity, or only zeros.
            dtype: In which the candidates compute.
            what: Names the call in the log.

        Returns:
            Milliseconds of each candidate that was timed.
        """
        largest = expected.abs().amax().item()
        if not 0 < largest < math.inf:
            return {}
        tolerance = _TOLERANCE[dtype]
        if dtype == torch.float32 and expected.is_cuda and any(map(_private.allows_tf32, ('conv', 'matmul'))):
            tolerance = 5e-3
        times = timing(agreeing(candidates, expected, tolerance * largest, what), slow=3)
        if times:
            fastest = min(times, key=times.__getitem__)
            self._fastest[call] = fastest, times[fastest]
        return times

    @staticmethod
    def can_hold(weight: torch.Tensor) -> bool:
        """Whether each change of a weight counts as a new version: not with fused optimizers, nor in inference mode."""
        return not weight.is_inference() and not weight.requires_grad

    def derived(self, weight: torch.Tensor, made_for: Hashable, derive: Callable, *args: Any) -> Any:
        """What `derive(weight, *args)` returns, called again if the weight or `made_for` changed.

        None if `derive` returns None, or if it cannot be kept.
        """
        if not self.can_hold(weight):
            return None
        key = (made_for, weight.data_ptr(), weight._version, weight.shape, weight.stride(), weight.dtype)
        kept = self._derived  # read once: threads may share it
        if kept is None or kept[0] != key:
            found = derive(weight, *args)
            if found is None:
                return None
            # Holding the weight, too, keeps its address from being reused.
            kept = self._derived = key, found, weight.detach()
        return kept[1]
