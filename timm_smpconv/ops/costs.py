"""What a convolution is expected to cost on this CPU: counts of operations times rates.

Shapes: B batch, C channels, H and W height and width, K and L height and width of the kernel, after cropping.

The counts and the fixed factors were fitted to 1,872 cases (`python -m benchmarks.cpu choice`) on 2 cores with AVX-512
and with AVX2, on one thread and on two. Rates are those of that CPU, corrected by a measurement where this one differs.
"""
import logging
import math
import os
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Dict, List, NamedTuple

import torch
import torch.nn.functional as F

from . import cpu
from .backends import fft, native

__all__ = ['Case', 'Kind', 'Rates', 'expected', 'fixed', 'rates']

_logger = logging.getLogger(__name__)


class Rates(NamedTuple):
    """Nanoseconds of one unit of work in float32, with a number of threads; in use, to a common factor."""
    wide: float  # a multiplication of a wide depthwise kernel in channels_last
    narrow: float  # of a 5×5 kernel in channels_last
    corr: float  # of a 5×5 kernel's gradient in channels_last
    transform: float  # an FFT of N samples has N log2 N units
    copy: float  # an entry converted to the other memory format
    dense: float  # a multiplication of a convolution over channels


class Kind(NamedTuple):
    """What is known of CPUs of one capability."""
    widest: int  # kernel of oneDNN's own depthwise program; wider ones are fast in channels_last alone
    lanes: int  # channels computed at a time
    wide_gradient: float  # oneDNN's own input gradient of a wide kernel, in times of the output
    narrow_gradient: float  # and of a narrow one, in channels_last
    one_thread: Rates
    two_threads: Rates


_AVX2 = Kind(
    9, 8, 1.1, 0.97,
    Rates(wide=0.055, narrow=0.035, corr=0.24, transform=0.17, copy=0.7, dense=0.022),
    Rates(wide=0.03, narrow=0.017, corr=0.12, transform=0.105, copy=0.42, dense=0.0125))
# C 192, 28×28, batch 4, contiguous, ms: with AVX-512 13×13 6.1 and 15×15 61, with AVX2 9×9 0.9 and 11×11 25, without
# 7×7 4.3 and 9×9 21.
KINDS = {
    'AVX512': Kind(
        13, 16, 2.1, 1.7,
        Rates(wide=0.028, narrow=0.024, corr=0.31, transform=0.19, copy=0.7, dense=0.02),
        Rates(wide=0.015, narrow=0.013, corr=0.155, transform=0.13, copy=0.46, dense=0.0118)),
    'AVX2': _AVX2,
    'DEFAULT': _AVX2._replace(widest=7, lanes=4),  # not measured
}

_SECONDS = 0.05  # after which a measurement ends
_measured: Dict[int, Rates] = {}
_lock = threading.Lock()


def kind() -> Kind:
    """What is known of this CPU."""
    return KINDS.get(cpu.HERE.capability, KINDS['DEFAULT'])


class Case(NamedTuple):
    """One pass of a depthwise convolution on the CPU."""
    what: str  # 'output', 'input gradient' or 'weight gradient'
    onednn: bool  # whether oneDNN computes it
    channels_last: bool  # the format of x
    itemsize: int  # bytes of an entry
    b: int
    c: int
    h: int
    w: int
    k: int
    l: int


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, 'register_at_fork'):  # another thread of the parent may have been measuring
    os.register_at_fork(after_in_child=_renew_lock)


@torch.compiler.assume_constant_result
def rates() -> Rates:
    """The rates of this CPU, relative to each other, for the number of threads in use.

    Measured at the first call, in 20 to 60 ms.

    `fixed(threads)` where deterministic algorithms are asked for, and on a machine too busy to measure.
    """
    threads = torch.get_num_threads()
    if torch.are_deterministic_algorithms_enabled():
        return fixed(threads)
    with _lock:
        if threads not in _measured:
            start = time.perf_counter()
            try:
                # A thread of its own has no autocast, no dispatch mode, no transform and no recorded graph.
                with ThreadPoolExecutor(1) as pool:
                    found = pool.submit(_measure, threads).result()
            except RuntimeError as error:  # no memory or no thread, as when the interpreter shuts down
                _logger.debug('nothing was measured for %d threads: %s', threads, error)
                return _measured.setdefault(threads, fixed(threads))
            _measured[threads] = _settled(found, fixed(threads))
            _logger.debug(
                'measured in %.0f ms for %d threads: %s, used: %s', 1e3 * (time.perf_counter() - start), threads, found,
                _measured[threads])
        return _measured[threads]


def fixed(threads: int) -> Rates:
    """The rates of the CPUs that the fit is of."""
    return kind().two_threads if threads > 1 else kind().one_thread


def _settled(found: Rates, usual: Rates) -> Rates:
    """The usual rates times powers of four, as the measured ones are to each other: a choice compares only.

    So a rate is corrected where it is off by more than 2. Measurements of one machine differ by up to 1.7 from process
    to process, which must not decide: a training that is resumed would not go on with the same losses.

    Or the usual ones if work of one kind takes about as many times that of another as on no machine but a busy one.
    """
    times = [measured / rate for measured, rate in zip(found, usual)]
    if not (min(times) > 0 and max(times) < 6 * min(times) and max(times) < 10):
        return usual
    middle = statistics.median(times)
    return Rates(*(rate * 4. ** round(math.log(ratio / middle, 4)) for rate, ratio in zip(usual, times)))


def _measure(threads: int) -> Rates:
    usual = torch.get_num_threads()  # of new threads, which `set_num_threads` changes too
    torch.set_num_threads(threads)
    try:
        return _time_probes()
    finally:
        torch.set_num_threads(usual)


def _time_probes() -> Rates:
    # When this is freed, glibc raises its limits, as in a process that has computed with large tensors: it no longer
    # returns the memory of smaller ones to the system.
    torch.empty(30 * 2 ** 20, dtype=torch.uint8, device='cpu')
    wide = Case('output', True, True, 4, 1, 64, 28, 28, 29, 29)
    narrow = wide._replace(b=4, k=5, l=5)
    corr = narrow._replace(b=2, what='weight gradient')
    with torch.inference_mode():
        def image(case: Case) -> torch.Tensor:
            return torch.ones(case.b, case.c, case.h, case.w, dtype=torch.float32, device='cpu').contiguous(
                memory_format=torch.channels_last)

        def kernel(case: Case) -> torch.Tensor:
            return torch.ones(case.c, 1, case.k, case.l, dtype=torch.float32, device='cpu')

        large, some, few = image(wide), image(narrow), image(corr)
        planes, dense = large.contiguous(), torch.ones(32, 32, 7, 7, dtype=torch.float32, device='cpu')
        wide_kernel, narrow_kernel = kernel(wide), kernel(narrow)
        square = torch.ones(1, 32, 28, 28, dtype=torch.float32, device='cpu')
        runs: List[Callable[[], object]] = [
            lambda: native.conv(large, wide_kernel),
            lambda: native.conv(some, narrow_kernel),
            lambda: native.corr(few, few, 5, 5),
            lambda: fft.conv(planes, wide_kernel),
            some.contiguous,
            lambda: F.conv2d(square, dense, padding=3),
        ]
        best = [math.inf] * len(runs)
        end = time.perf_counter() + _SECONDS
        for turn in range(8):  # the first are to warm up; they take turns, and the fastest counts
            if turn > 2 and time.perf_counter() > end:
                break
            for i, run in enumerate(runs):
                start = time.perf_counter()
                run()
                best[i] = min(best[i], 1e9 * (time.perf_counter() - start))
    # The inverse of what `expected` says of these cases. In the fit, transforms were cheaper beside wide kernels than
    # these small computations are, and narrow kernels dearer.
    return Rates(
        wide=max(best[0] - _CALL, best[0] / 2) / _multiplications(wide),
        narrow=1.25 * max(best[1] - _CALL, best[1] / 2) / _multiplications(narrow),
        corr=max(best[2] - _CORR_CALL, best[2] / 2) / _products(corr),
        transform=0.67 * max(best[3] - _FFT_CALL, best[3] / 2) / (_units(wide) * (2 * wide.b + 1.2) * wide.c),
        copy=best[4] / some.numel(),
        dense=best[5] / (square.numel() * dense[:, 0].numel()),
    )


# Of a call, nanoseconds.
_CALL, _CORR_CALL, _FFT_CALL = 7e4, 1.2e5, 1.3e5


def _multiplications(case: Case) -> float:
    """Taps of all outputs that meet no padding, and a few for what a tap-free output costs.

    Of the columns of a wide kernel that meet nothing but padding, a fifth is not skipped.
    """
    m, n = case.k // 2, case.l // 2
    skipped = n * (n + 1) / case.w * (0.8 if case.l > kind().widest else 1)
    taps = (case.k - m * (m + 1) / case.h) * (case.l - skipped) + 5.5
    return case.b * -(-case.c // kind().lanes) * kind().lanes * case.h * case.w * taps


def _products(case: Case) -> float:
    """Products that a direct weight gradient sums, those with padding among them."""
    return case.b * -(-case.c // kind().lanes) * kind().lanes * case.h * case.w * case.k * case.l


def _units(case: Case) -> float:
    """N log2 N of one plane's transform."""
    n = fft.fast_length(case.h + case.k // 2) * fft.fast_length(case.w + case.l // 2)
    return n * math.log2(n) + 1050


def expected(case: Case, is_transformed: bool = False) -> Dict[str, float]:
    """Nanoseconds of one pass by each backend.

    Args:
        case: The pass.
        is_transformed: Whether the transform of x is there already.
    """
    r = rates()
    entries = case.b * case.c * case.h * case.w
    swap = 2 * r.copy * entries  # to the other memory format and back
    if case.what == 'weight gradient':
        direct = {format: _direct_corr(case, r, format) for format in (False, True)}
        swap *= 2  # there are two maps
        call, planes, rest = 2.2 * _FFT_CALL, 1.35 * (2 * case.b + 1) * case.c, 1500
    else:
        direct = {format: _direct(case, r, format) for format in (False, True)}
        call, planes, rest = _FFT_CALL, 1.05 * (2 * case.b + 1.2) * case.c, 0
    if is_transformed:
        planes -= case.b * case.c
    flip = 0.6 * case.c * case.k * case.l if case.what == 'input gradient' else 0.
    own = case.channels_last
    transformed = call + r.transform * (_units(case) + rest) * planes
    if own or case.itemsize < 4:
        transformed += 2 * r.copy * entries
    times = {
        'native': direct[own],
        'contiguous': direct[False] + (swap if own else 0) + flip,
        'channels_last': direct[True] + (0 if own else swap) + flip,
        'fft': transformed + flip,
    }
    if case.what == 'input gradient' and case.onednn:  # a program of its own
        if case.l > kind().widest:
            rate = kind().wide_gradient * r.wide
        elif own:
            rate = kind().narrow_gradient * r.narrow
        else:
            rate = (1.7 if case.l > 9 or kind().lanes < 16 else 1.45) * r.narrow
        times['native'] = _CALL + rate * _multiplications(case)
    return times


def _direct(case: Case, r: Rates, channels_last: bool) -> float:
    """A direct convolution."""
    if not case.onednn:  # a loop that prefers contiguous
        rate = 5. if not channels_last else 10.
    elif channels_last and case.l <= min(11, kind().widest):
        rate = r.narrow
    elif channels_last:
        rate = r.wide if case.l > kind().widest else 2.9 * r.wide
    else:
        rate = (1.2 if case.l <= kind().widest else 26) * r.narrow
    return _CALL + rate * (0.6 if case.itemsize < 4 else 1) * _multiplications(case)


def _direct_corr(case: Case, r: Rates, channels_last: bool) -> float:
    """A direct weight gradient."""
    rate = r.corr
    if not case.onednn:
        rate = 5. if not channels_last else 10.
    elif not channels_last:
        rate *= 2.3
    elif case.k // 2 > case.h / 3 or case.l // 2 > case.w / 3:  # oneDNN's own program excludes such margins
        rate *= 5
    return _CORR_CALL + rate * _products(case) + (12 * case.c * case.k * case.l if channels_last else 0)
