"""What a convolution is expected to cost on this CPU: counts of operations times rates.

Shapes: B batch, C channels, H and W height and width, KH and KW height and width of the kernel, after cropping; for
convolutions over channels I and O channels in and out, L and K size of the input and of the kernel in each dimension.

The counts, factors and rates were fitted to 1,872 cases (`python -m benchmarks.cpu choice`) on 2 cores with AVX-512 and
with AVX2, on one thread and on two. Only the ratios of rates matter to a choice. On an Intel Xeon with AMX, which is
not among those CPUs, rates measured 0.75 to 1.7 times the fitted ones.
"""
import math
from typing import Dict, NamedTuple, Sequence

import torch

from ..backends import fft
from . import cpu
from .geometry import Geometry

__all__ = ['Kind', 'Rates', 'expected', 'expected_over_channels', 'rates']


class Rates(NamedTuple):
    """Nanoseconds of one unit of work in float32, with a number of threads; only their ratios matter."""
    wide: float  # a multiplication of a wide depthwise kernel in channels_last
    narrow: float  # of a 5×5 kernel in channels_last
    weight_gradient: float  # of a 5×5 kernel's gradient in channels_last
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
    Rates(wide=0.055, narrow=0.035, weight_gradient=0.24, transform=0.17, copy=0.7, dense=0.022),
    Rates(wide=0.03, narrow=0.017, weight_gradient=0.12, transform=0.105, copy=0.42, dense=0.0125))
# C 192, 28×28, batch 4, contiguous, ms: with AVX-512 13×13 6.1 and 15×15 61, with AVX2 9×9 0.9 and 11×11 25, without
# 7×7 4.3 and 9×9 21.
KINDS = {
    'AVX512': Kind(
        13, 16, 2.1, 1.7,
        Rates(wide=0.028, narrow=0.024, weight_gradient=0.31, transform=0.19, copy=0.7, dense=0.02),
        Rates(wide=0.015, narrow=0.013, weight_gradient=0.155, transform=0.13, copy=0.46, dense=0.0118)),
    'AVX2': _AVX2,
    'DEFAULT': _AVX2._replace(widest=7, lanes=4),  # not measured
}


def kind() -> Kind:
    """What is known of this CPU."""
    return KINDS.get(cpu.HERE.capability, KINDS['DEFAULT'])


@torch.compiler.assume_constant_result
def rates() -> Rates:
    """The rates for the number of threads in use."""
    return kind().two_threads if torch.get_num_threads() > 1 else kind().one_thread


# Of a call, nanoseconds.
_CALL, _GRADIENT_CALL, _FFT_CALL = 7e4, 1.2e5, 1.3e5


def _is_by_onednn(g: Geometry) -> bool:
    """Whether oneDNN computes it."""
    return g.dtype in cpu.HERE.onednn and bool(torch.backends.mkldnn.enabled)


def _multiplications(g: Geometry) -> float:
    """Taps of all outputs that meet no padding, and a few for what a tap-free output costs.

    Of the columns of a wide kernel that meet nothing but padding, a fifth is not skipped.
    """
    m, n = g.kh // 2, g.kw // 2
    skipped = n * (n + 1) / g.w * (0.8 if g.kw > kind().widest else 1)
    taps = (g.kh - m * (m + 1) / g.h) * (g.kw - skipped) + 5.5
    return g.b * -(-g.c // kind().lanes) * kind().lanes * g.h * g.w * taps


def _products(g: Geometry) -> float:
    """Products that a direct weight gradient sums, those with padding among them."""
    return g.b * -(-g.c // kind().lanes) * kind().lanes * g.h * g.w * g.kh * g.kw


def _units(g: Geometry) -> float:
    """N log2 N of one plane's transform."""
    n = fft.fast_length(g.h + g.kh // 2) * fft.fast_length(g.w + g.kw // 2)
    return n * math.log2(n) + 1050


def expected(g: Geometry, is_transformed: bool = False) -> Dict[str, float]:
    """Nanoseconds of one pass by each backend.

    Args:
        g: The pass, `cropped`.
        is_transformed: Whether the transform of x is there already.
    """
    r = rates()
    entries = g.b * g.c * g.h * g.w
    swap = 2 * r.copy * entries  # to the other memory format and back
    if g.what == 'weight gradient':
        direct = {format: _direct_weight_gradient(g, r, format) for format in (False, True)}
        swap *= 2  # there are two maps
        call, planes, rest = 2.2 * _FFT_CALL, 1.35 * (2 * g.b + 1) * g.c, 1500
    else:
        direct = {format: _direct(g, r, format) for format in (False, True)}
        call, planes, rest = _FFT_CALL, 1.05 * (2 * g.b + 1.2) * g.c, 0
    if is_transformed:
        planes -= g.b * g.c
    flip = 0.6 * g.c * g.kh * g.kw if g.what == 'input gradient' else 0.
    own = g.channels_last
    transformed = call + r.transform * (_units(g) + rest) * planes
    if own or g.dtype.itemsize < 4:
        transformed += 2 * r.copy * entries
    times = {
        'native': direct[own],
        'contiguous': direct[False] + (swap if own else 0) + flip,
        'channels_last': direct[True] + (0 if own else swap) + flip,
        'fft': transformed + flip,
    }
    if g.what == 'input gradient' and _is_by_onednn(g):  # a program of its own
        if g.kw > kind().widest:
            rate = kind().wide_gradient * r.wide
        elif own:
            rate = kind().narrow_gradient * r.narrow
        else:
            rate = (1.7 if g.kw > 9 or kind().lanes < 16 else 1.45) * r.narrow
        times['native'] = _CALL + rate * _multiplications(g)
    return times


def _direct(g: Geometry, r: Rates, channels_last: bool) -> float:
    """A direct convolution."""
    if not _is_by_onednn(g):  # a loop that prefers contiguous
        rate = 5. if not channels_last else 10.
    elif channels_last and g.kw <= min(11, kind().widest):
        rate = r.narrow
    elif channels_last:
        rate = r.wide if g.kw > kind().widest else 2.9 * r.wide
    else:
        rate = (1.2 if g.kw <= kind().widest else 26) * r.narrow
    return _CALL + rate * (0.6 if g.dtype.itemsize < 4 else 1) * _multiplications(g)


def _direct_weight_gradient(g: Geometry, r: Rates, channels_last: bool) -> float:
    """A direct weight gradient."""
    rate = r.weight_gradient
    if not _is_by_onednn(g):
        rate = 5. if not channels_last else 10.
    elif not channels_last:
        rate *= 2.3
    elif g.kh // 2 > g.h / 3 or g.kw // 2 > g.w / 3:  # oneDNN's own program excludes such margins
        rate *= 5
    return _GRADIENT_CALL + rate * _products(g) + (12 * g.c * g.kh * g.kw if channels_last else 0)


def expected_over_channels(
        size: Sequence[int],
        weight_size: Sequence[int],
        before: Sequence[int],
        groups: int,
        keeps: bool,
        on_cpu: bool,
) -> Dict[str, float]:
    """The same for a convolution over channels, its output and gradients together: 'native' and 'fft'.

    Args:
        size: (B, I, *L).
        weight_size: (O, I / groups, *K).
        before: Zeros in front of the input, for each dimension.
        groups: Of the channels.
        keeps: Whether the kernel's transform is there already.
        on_cpu: Elsewhere the times are in units of arithmetic.
    """
    batch, inputs, *lengths = size
    outputs, per_group, *kernel_size = weight_size
    products = batch * outputs * per_group
    direct, frequencies = products, 1
    for n, k, p in zip(lengths, kernel_size, before):
        direct *= n * k
        frequencies *= n + max(p, k - 1 - p)
    frequencies //= 2
    transformed = batch * (inputs + outputs) + (0 if keeps else outputs * per_group)
    if not on_cpu:
        # No GPU has timed it. It is chosen where a direct convolution takes 10 times the arithmetic.
        return {'native': direct, 'fft': 10 * frequencies * (4 * products + 60 * transformed)}
    # A complex product costs 7 multiplications, an entry of a spectrum 50 units of a transform, there and back, and a
    # call 0.3 ms. Output and gradients on one core with AVX2, direct and by FFT, ms:
    # (64, 48, 32, 32), 3×3: 139, 304, 5×5: 301, 334; batch 16, 9×9: 246, 118; batch 1, 33×33: 522, 156;
    # (64, 30, 784), 5 taps: 35, 77, 20: 209, 90; batch 1, 60: 13, 18, 784: 181, 31.
    r = rates()
    spectra = 7 * r.dense * products + 50 * r.transform * len(before) * transformed
    return {'native': r.dense * direct, 'fft': frequencies * spectra + 3e5 * groups}
