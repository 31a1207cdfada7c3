"""What a convolution is expected to cost on this CPU: counts of operations times rates.

Shapes: B batch, C channels, H and W height and width, K and L height and width of the kernel, after cropping.

The counts, factors and rates were fitted to 1,872 cases (`python -m benchmarks.cpu choice`) on 2 cores with AVX-512 and
with AVX2, on one thread and on two. Only the ratios of rates matter to a choice. On an Intel Xeon with AMX, which is not
among those CPUs, rates measured 0.75 to 1.7 times the fitted ones.
"""
import math
from typing import Dict, NamedTuple

import torch

from . import cpu
from .backends import fft

__all__ = ['Case', 'Kind', 'Rates', 'expected', 'rates']


class Rates(NamedTuple):
    """Nanoseconds of one unit of work in float32, with a number of threads; only their ratios matter."""
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


@torch.compiler.assume_constant_result
def rates() -> Rates:
    """The rates for the number of threads in use."""
    return kind().two_threads if torch.get_num_threads() > 1 else kind().one_thread


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
