"""The race of backends on a GPU: the first call of a shape times all candidates, later calls run the fastest.

Shapes: B batch, C channels, H and W height and width, K and L height and width of the kernel.

One pass of a convolution (output, input gradient, weight gradient) has a reference, PyTorch's own convolution, and
other candidates. `compute` runs one of them:

- A shape it knows: the winner of its race.
- A shape it does not know: the reference, whose result it returns. Then every other candidate runs and is compared with
  that result. One that is wrong or fails is dropped, with a line in the log. The others are timed, and the fastest is
  remembered if it is at least 3 % faster than the reference.

Shapes are remembered for each device, dtype, memory format, pass, C, K, L and precision of float32, with B, H and W
rounded up to 1, 2, 3, 4, 6, 8, 12, 16, 24 and so on, two buckets an octave. After `MAX_RACES` races with the same C, K,
L and so on, a new bucket takes the winner of the nearest bucket, without a race of its own.

Results of later calls, and of another process, may thus come from another backend. The ranks of a distributed run time
for themselves and never wait for each other. Where results must not differ, ask for deterministic algorithms: then
there is no race, see `is_allowed`. No thread waits either: while one races, those that would run the reference.

At any time a race holds the reference's result and one other.
"""
import logging
import math
import statistics
import threading
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Protocol, Set, Tuple

import torch

from . import private

__all__ = ['Case', 'CudaClock', 'Key', 'Record', 'compute', 'forget', 'is_allowed', 'make_key', 'remembered']

_logger = logging.getLogger(__name__)

Run = Callable[[], torch.Tensor]
Sizes = Tuple[int, int, int]  # B, H, W

MAX_RACES = 16  # of one case, see `Case`
ROUNDS = 3  # of timing, the candidates in turn
SLOW = 3  # times slower than the fastest in the first round: not timed again
GAIN = 0.97  # of the reference's time that the winner takes at most
_PIECE = 2 ** 24  # elements compared at a time: they are copied, to float32 at least
_MAX_WARM = 256  # sizes of a bucket that are known to have run


class Case(NamedTuple):
    """What a pass depends on, but for the sizes that vary from call to call.

    Attributes:
        what: 'output', 'input gradient' or 'weight gradient'.
        device: The index of the CUDA device.
        dtype: Of the input.
        formats: 'contiguous', 'channels_last' or 'strided', of each input.
        c: Channels.
        k: Height of the kernel.
        l: Width of the kernel.
        settings: Whether cuDNN is on, and how PyTorch computes float32 in convolutions and matrix products.
    """
    what: str
    device: int
    dtype: torch.dtype
    formats: Tuple[str, ...]
    c: int
    k: int
    l: int
    settings: Tuple[bool, str, str]


class Key(NamedTuple):
    """A case and sizes, B, H and W. All sizes of a bucket have one race."""
    case: Case
    sizes: Sizes

    @property
    def bucket(self) -> Sizes:
        """The sizes rounded up to 1, 2, 3, 4, 6, 8, 12, 16, 24 and so on."""
        b, h, w = self.sizes
        return _round_up(b), _round_up(h), _round_up(w)


class Record(NamedTuple):
    """What is known of a bucket of sizes.

    Attributes:
        case: What else it depends on.
        bucket: B, H and W, rounded up.
        winner: The name of the candidate that runs.
        times: Milliseconds of one call for each candidate that was timed.
        dropped: For each candidate that is never run again, why.
        neighbor: The bucket whose winner was taken, None if this one had its own race.
    """
    case: Case
    bucket: Sizes
    winner: str
    times: Dict[str, float]
    dropped: Dict[str, str]
    neighbor: Optional[Sizes]


class Clock(Protocol):
    """What times a candidate."""

    def time(self, run: Run) -> float:
        """Milliseconds that one call of `run` takes."""


class CudaClock:
    """Times the work of the current CUDA device on its current stream, with its launch.

    One call if that takes long, else the mean of several in a row.
    """
    ENOUGH = 3.  # ms
    MAX_CALLS = 20

    def time(self, run: Run) -> float:
        """Milliseconds that one call of `run` takes."""
        first = self._mean(run, 1)
        calls = min(self.MAX_CALLS, int(self.ENOUGH / max(first, 1e-3)))
        return self._mean(run, calls) if calls > 1 else first

    @staticmethod
    def _mean(run: Run, calls: int) -> float:
        stream = torch.cuda.current_stream()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream.synchronize()  # behind work that is still queued, launches would cost nothing
        start.record(stream)
        for _ in range(calls):
            run()
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end) / calls


@dataclass
class _Entry:
    winner: str
    times: Dict[str, float] = field(default_factory=dict)
    dropped: Dict[str, str] = field(default_factory=dict)
    neighbor: Optional[Sizes] = None
    warm: Set[Sizes] = field(default_factory=set)  # sizes at which the winner has run


clock: Clock = CudaClock()
_known: Dict[Case, Dict[Sizes, _Entry]] = {}
_calls: Dict[Tuple[Case, Sizes], int] = {}  # calls with unknown sizes that could have raced
_racing = threading.Lock()  # Never waited for. Its holder alone adds to the two above.


def is_allowed(x: torch.Tensor) -> bool:
    """Whether a convolution of x may be computed by whatever backend is fastest, and timed to find out.

    It may on CUDA with `torch.backends.cudnn.benchmark` on, unless deterministic algorithms are asked for, or something
    other than the device sees the operators: a compiler, fake tensors, subclasses, dispatch modes, `torch.func`.
    """
    return (
        is_wanted(x) and type(x) in (torch.Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling() and not torch.jit.is_tracing()
        and not private.dispatch_mode_active() and not private.transforms_active() and not private.is_batched(x)
    )


def is_wanted(x: torch.Tensor) -> bool:
    """`is_allowed`, whatever sees the operators: a compiler does, whose code calls an operator that races."""
    return _is_on_cuda(x) and _is_switched_on()


@torch.compiler.assume_constant_result
def _is_switched_on() -> bool:
    deterministic = torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    return torch.backends.cudnn.benchmark and not deterministic


def make_key(what: str, x: torch.Tensor, k: int, l: int, grad: Optional[torch.Tensor] = None) -> Key:
    """What the fastest backend depends on.

    Args:
        what: The pass: 'output', 'input gradient' or 'weight gradient'.
        x: What is convolved, (B, C, H, W).
        k: Height of the kernel.
        l: Width of the kernel.
        grad: For a weight gradient, the gradient of the output, (B, C, H, W).
    """
    b, c, h, w = x.shape
    formats = (_format(x),) if grad is None else (_format(x), _format(grad))
    # `allow_tf32` raises where somebody has set `fp32_precision`, which follows both.
    settings = (
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.fp32_precision,
    )
    return Key(Case(what, x.get_device(), x.dtype, formats, c, k, l, settings), (b, h, w))


def compute(key: Key, candidates: Mapping[str, Run], tolerance: float) -> torch.Tensor:
    """The result of the fastest candidate known, or of the first one, the reference.

    The first call of a key races. During the capture of a CUDA graph nothing is timed, and the winner runs only if it
    has run with the same sizes before: otherwise it might compile, which ends the capture.

    Args:
        key: From `make_key`.
        candidates: Functions by name. Each returns the whole result, in the dtype and memory format of the reference's:
            a conversion after the race is not timed.
        tolerance: Largest difference to the reference's result, relative to the largest magnitude in it. It has to
            cover the reference's own error, as in TF32.

    Raises:
        Exception: What the reference raises.
    """
    reference = next(iter(candidates))
    entry = _known.get(key.case, {}).get(key.bucket)
    if entry is None:
        return _meet(key, candidates, reference, tolerance)
    winner = entry.winner
    if winner == reference or winner not in candidates:
        return candidates[reference]()
    is_warm = key.sizes in entry.warm
    if not is_warm and _is_capturing(key):
        return candidates[reference]()
    result, reason = _attempt(key, candidates[winner])
    if reason is not None:
        entry.winner = reference
        _drop(key, entry.dropped, winner, reason, logging.WARNING)
        return candidates[reference]()
    if not is_warm and len(entry.warm) < _MAX_WARM:
        entry.warm.add(key.sizes)
    return result


def remembered() -> List[Record]:
    """What is known so far."""
    return [
        Record(case, bucket, entry.winner, dict(entry.times), dict(entry.dropped), entry.neighbor)
        for case, entries in list(_known.items()) for bucket, entry in list(entries.items())
    ]


def forget() -> None:
    """Forget all races: each key races again."""
    _known.clear()
    _calls.clear()


def _meet(key: Key, candidates: Mapping[str, Run], reference: str, tolerance: float) -> torch.Tensor:
    """The result for a bucket that was unknown; makes it known if that is possible now."""
    if len(candidates) == 1 or _is_capturing(key) or not _racing.acquire(blocking=False):
        return candidates[reference]()
    try:
        known = _known.setdefault(key.case, {})
        raced = [bucket for bucket, entry in known.items() if entry.neighbor is None]
        if key.bucket not in known and len(raced) < MAX_RACES:
            result = candidates[reference]()
            place = (key.case, key.bucket)
            calls = _calls[place] = _calls.get(place, 0) + 1
            # Each try makes the device wait. Where results never can be judged, as in a dead layer, tries get rare.
            if calls & (calls - 1) == 0:
                entry = _try_race(key, candidates, reference, result, tolerance)
                if entry is not None:
                    known[key.bucket] = entry
            return result
        if key.bucket not in known:
            neighbor = min(raced, key=lambda bucket: _distance(bucket, key.bucket))
            known[key.bucket] = _Entry(known[neighbor].winner, neighbor=neighbor)
    finally:
        _racing.release()
    return compute(key, candidates, tolerance)


def _try_race(
        key: Key,
        candidates: Mapping[str, Run],
        reference: str,
        expected: torch.Tensor,
        tolerance: float,
) -> Optional[_Entry]:
    """What a race finds: the reference wins if it fails; None if the expected result can judge nothing."""
    with torch.no_grad(), torch.cuda.device(key.case.device):
        entry, reason = _attempt(key, _race, key, candidates, reference, expected, tolerance)
        if entry is not None:
            _free_memory(key)  # as PyTorch does after a benchmark of its own: the losers may have taken gigabytes
    if reason is not None:
        entry = _Entry(reference)
        _logger.info('backend %s stays for the %s, which could not be timed: %s', reference, _describe(key), reason)
    return entry


def _race(
        key: Key,
        candidates: Mapping[str, Run],
        reference: str,
        expected: torch.Tensor,
        tolerance: float,
) -> Optional[_Entry]:
    limit = _largest_error(expected, tolerance)
    if limit is None:
        return None
    dropped: Dict[str, str] = {}
    for name, run in candidates.items():
        if name != reference:
            fault, reason = _attempt(key, _find_fault, run, expected, limit)
            if reason is not None:
                _drop(key, dropped, name, reason, logging.INFO)
            elif fault is not None:
                _drop(key, dropped, name, fault, logging.WARNING)
    samples: Dict[str, List[float]] = {name: [] for name in candidates if name not in dropped}
    for _ in range(ROUNDS):
        fastest = min((times[0] for times in samples.values() if times), default=math.inf)
        running = [name for name, times in samples.items() if not times or times[0] <= SLOW * fastest]
        if len(running) == 1:
            break
        for name in running:
            if name == reference:
                samples[name].append(clock.time(candidates[name]))
                continue
            time, reason = _attempt(key, clock.time, candidates[name])
            if reason is None:
                samples[name].append(time)
            else:
                _drop(key, dropped, name, reason, logging.INFO)
                del samples[name]
    times = {name: statistics.median(found) for name, found in samples.items() if found}
    winner = min(times, key=lambda name: times[name], default=reference)
    if winner != reference and times[winner] > GAIN * times[reference]:
        winner = reference
    listed = ', '.join(f'{name} {ms:.3g}' for name, ms in times.items())
    _logger.info('backend %s is taken for the %s, ms: %s', winner, _describe(key), listed or 'no other is left')
    return _Entry(winner, times, dropped, warm={key.sizes})


def _largest_error(expected: torch.Tensor, tolerance: float) -> Optional[float]:
    """The largest difference to the expected result that is allowed, None if that result can judge nothing.

    That is so if it holds NaN or infinity, or hardly more than zeros: there anything agrees, or nothing does.
    """
    largest = max(abs(limit.item()) for limit in torch.aminmax(expected))
    limit = tolerance * largest
    smallest = torch.finfo(expected.dtype).smallest_normal * torch.finfo(expected.dtype).eps
    return limit if math.isfinite(largest) and limit > smallest else None


def _find_fault(run: Run, expected: torch.Tensor, limit: float) -> Optional[str]:
    """What is wrong with the result of a candidate."""
    result = run()
    for name in ('shape', 'dtype', 'device'):
        found, wanted = getattr(result, name), getattr(expected, name)
        if found != wanted:
            return f'its result has {name} {found}, the reference {wanted}'
    dtype = torch.promote_types(expected.dtype, torch.float32)
    step = max(1, _PIECE // expected[0].numel())
    errors = [(a.to(dtype) - b.to(dtype)).abs_().amax() for a, b in zip(result.split(step), expected.split(step))]
    error = torch.stack(errors).amax().item()  # NaN if any is
    return None if error <= limit else f'its result is off by {error:.3g}, more than {limit:.3g}'


def _attempt(key: Key, function: Callable, *args: Any) -> Tuple[Any, Optional[str]]:
    """What the function returns and None, or None and what it raised."""
    try:
        return function(*args), None
    except Exception as error:  # compilers and libraries raise anything
        lines = str(error).splitlines() or ['']
        reason = f'{type(error).__name__}: {lines[0][:200]}'
    # Not earlier: the exception holds what the function had allocated.
    _free_memory(key)
    return None, reason


def _drop(key: Key, dropped: Dict[str, str], name: str, reason: str, level: int) -> None:
    dropped[name] = reason
    _logger.log(level, 'backend %s is dropped for the %s: %s', name, _describe(key), reason)


def _free_memory(key: Key) -> None:
    if not _is_capturing(key):
        torch.cuda.empty_cache()


def _is_capturing(key: Key) -> bool:
    if not torch.cuda.is_initialized():
        return False
    with torch.cuda.device(key.case.device):
        return torch.cuda.is_current_stream_capturing()


def _is_on_cuda(x: torch.Tensor) -> bool:
    return x.is_cuda


def _format(x: torch.Tensor) -> str:
    if x.is_contiguous():
        return 'contiguous'
    return 'channels_last' if x.is_contiguous(memory_format=torch.channels_last) else 'strided'


def _round_up(n: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24 and so on."""
    power = 1 << (n - 1).bit_length()
    return power * 3 // 4 if power * 3 // 4 >= n else power


def _distance(a: Sizes, b: Sizes) -> float:
    """In octaves, over batch, height and width."""
    return sum(abs(math.log2(m / n)) for m, n in zip(a, b))


def _describe(key: Key) -> str:
    case, (b, h, w) = key.case, key.sizes
    return (
        f'{case.what} of {b} × {case.c} × {h} × {w}, kernel {case.k} × {case.l}, {case.dtype}, '
        f'{" and ".join(case.formats)}, on cuda:{case.device}')
