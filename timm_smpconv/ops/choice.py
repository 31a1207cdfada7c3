"""Which backend computes a convolution: the requested one, or one selected by benchmark rules or by a count.

Shapes: B batch, C channels, H and W height and width, K and L height and width of the kernel.
"""
import logging
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Callable, Generator, NamedTuple, Optional, Sequence, Tuple

import torch

from . import private
from .backends import BACKENDS, Backend, fft

__all__ = ['use_backend']

_logger = logging.getLogger(__name__)
_TORCH = tuple(int(part) for part in torch.__version__.split('.')[:2])
_requested: ContextVar[Optional[str]] = ContextVar('timm_smpconv_backend', default=None)


@contextmanager
def use_backend(name: str) -> Generator[None, None, None]:
    """Compute all convolutions called inside, and their gradients, by one of `BACKENDS`.

    It holds for the current thread (or asyncio task) alone: not for the replicas of `nn.DataParallel`, nor for a
    backward pass that computes checkpointed layers again in another thread (the models of this package see to that).
    `torch.compile` cannot trace it, and before torch 2.14 does not see it: in compiled code pass `backend=` to
    `depthwise_conv2d`.

    Args:
        name: 'native', 'contiguous', 'channels_last', 'fft' or 'triton'.

    Raises:
        ValueError: There is no such backend. A convolution raises it, too, if the backend cannot run there.

    Example:
        >>> from timm_smpconv import depthwise_conv2d, use_backend
        >>> with use_backend('fft'):
        ...     y = depthwise_conv2d(torch.randn(1, 8, 14, 14), torch.randn(8, 1, 27, 27))
    """
    check_backend('name', name)
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def requested_backend() -> Optional[str]:
    """The backend of the innermost `use_backend`, None outside; also None in code that torch before 2.14 compiles."""
    if _TORCH < (2, 14) and torch.compiler.is_compiling():
        return None
    return _requested.get()


def check_backend(argument: str, name: str) -> None:
    """Raise if there is no such backend."""
    if name not in BACKENDS:
        raise ValueError(f'{argument} must be one of {", ".join(BACKENDS)}, got {name!r}')


ONEDNN_DTYPES = private.onednn_dtypes()
# The widest kernel of oneDNN's own depthwise program; wider ones are fast in channels_last alone. C 192, 28×28, batch
# 4, contiguous: with AVX-512 13×13 takes 6.1 ms and 15×15 61, with AVX2 9×9 0.9 and 11×11 25, without 7×7 4.3, 9×9 21.
WIDEST = {'AVX512': 13, 'AVX2': 9}.get(torch.backends.cpu.get_cpu_capability(), 7)


class Case(NamedTuple):
    """What the rules know of a convolution, K and L after cropping."""
    onednn: bool  # whether oneDNN computes it
    channels_last: bool  # the input's format
    b: int
    c: int
    h: int
    w: int
    k: int
    l: int

    @property
    def taps(self) -> float:
        """Taps of an output that meet no padding, on average."""
        m, n = self.k // 2, self.l // 2
        return (self.k - m * (m + 1) / self.h) * (self.l - n * (n + 1) / self.w)

    @property
    def taps_by_fft(self) -> float:
        """The same times the share of a transform that is not padding: what a transform has to beat."""
        return self.taps * self.h * self.w / ((self.h + self.k // 2) * (self.w + self.l // 2))


class Rule(NamedTuple):
    """When a backend is chosen on the CPU. The first rule that holds decides."""
    backend: str
    holds: Callable[[Case], bool]
    evidence: str  # ms, 2 cores, AVX-512, torch 2.15 and 2.14, batch 4 in float32 unless said; `benchmarks.cpu rules`


# Without oneDNN there is a loop that prefers NCHW.
CONV_RULES = (
    Rule('fft', lambda case: not case.onednn and case.k * case.l >= 49,
         'float64, batch 1, C 40, 28×28, 27×27: native 46, channels_last 106, fft 1.9; 14×14, 7×7: 2.1, 4.2, 0.5'),
    Rule('native', lambda case: not case.onednn,
         'float64, batch 1, C 40, 14×14, 5×5: native 1.1, channels_last 2.3, fft 0.4; C 3: 0.12, 0.22, 0.17'),
    Rule('native', lambda case: case.l <= min(11, WIDEST),
         'C 96, 56×56, 5×5: native 9.4, channels_last 15; with channels_last input, 11×11: native 4.5, contiguous 24'),
    Rule('contiguous', lambda case: case.l <= WIDEST,
         'C 96, 56×56, 13×13: contiguous 8.9, channels_last 22; with channels_last input, 768, 7×7, 13×13: 0.5, 0.8'),
    Rule('fft', lambda case: case.c <= 4 and case.taps >= 400,
         'C 3, 64×64, 31×31: channels_last 4.3, fft 0.8; C 16, 51×51: 6.3, 2.6, at batch 1 2.1, 3.1'),
    Rule('fft', lambda case: case.k * case.l >= 600 and case.taps_by_fft >= 600 and case.b >= 4,
         'C 64, 56×56, 51×51: channels_last 17.5, fft 6.7, at batch 16 82 and 34, at batch 1 5.1 and 7.0'),
    Rule('channels_last', lambda case: True,
         'C 96, 56×56, 15×15: native 147, channels_last 11; 31×31: 248, 14, fft 11, too close to rely on; 384, 14×14, '
         '27×27: 79, 1.2, 4.2'),
)
CORR_RULES = (
    Rule('fft', lambda case: not case.onednn and case.k * case.l >= 49,
         'float64, batch 1, C 40, 28×28, 27×27: native 80, channels_last 106, fft 1.6; 14×14, 7×7: 2.3, 4.5, 0.6'),
    Rule('native', lambda case: not case.onednn or case.l == 1 or case.k * case.l <= 9,
         'C 96, 56×56, 51×1: native 3.6, channels_last 6.1, fft 25; 384, 14×14, 3×3: 0.7, 1.2, 2.6'),
    Rule('channels_last', lambda case: case.l <= 14 and case.k * case.l <= 25 and (case.channels_last or case.b < 4),
         'channels_last input, C 96, 56×56, 5×5: native 6.3, fft 8.7; contiguous: native 14, channels_last 7.4, '
         'fft 5.3'),
    Rule('fft', lambda case: True,
         'C 96, 56×56, 31×31: native 1531, channels_last 1923, fft 11; 7×7: 11, 11, 9.5; 768, 7×7, 7×7: 5.9, 16, 3.1'),
)


def choose(rules: Tuple[Rule, ...], x: torch.Tensor, k: int, l: int, transform: bool = True) -> str:
    """The name of the backend the rules choose for x and a K×L kernel; not 'fft' unless `transform`."""
    dy, dx = margins(x, k, l)
    k, l = k - 2 * dy, l - 2 * dx
    onednn = working_dtype(x, l) in ONEDNN_DTYPES
    b, c, h, w = x.shape
    case = Case(onednn, memory_format(x) == torch.channels_last, b, c, h, w, k, l)
    return next(rule.backend for rule in rules if rule.holds(case) and (transform or rule.backend != 'fft'))


def conv_backend(x: torch.Tensor, weight: torch.Tensor, requested: Optional[str]) -> Backend:
    """The backend for a convolution: the requested one, or the chosen one.

    A transform is not chosen where a direct convolution would be far more accurate, see `backends.fft`.

    Raises:
        ValueError: The requested backend cannot run.
    """
    k, l = weight.shape[2:]
    name = requested or choose(CONV_RULES, x, k, l)
    if name == 'fft' and not requested and not fft.is_accurate(x, weight):
        name = choose(CONV_RULES, x, k, l, transform=False)
    return _runnable(name, requested, x)


def corr_backend(grad: torch.Tensor, x: torch.Tensor, k: int, l: int, requested: Optional[str]) -> Backend:
    """The backend for a weight gradient. As `conv_backend`, but a transform is passed over only if it overflows."""
    name = requested or choose(CORR_RULES, x, k, l)
    if name == 'fft' and not requested and not fft.is_in_range(grad, x):
        name = 'native'
    return _runnable(name, requested, x)


def _runnable(name: str, requested: Optional[str], x: torch.Tensor) -> Backend:
    reason = BACKENDS[name].unsupported(x)
    if reason is None:
        return BACKENDS[name]
    if requested:
        raise ValueError(f'backend {name!r} was requested and cannot run: {reason}')
    _logger.debug('backend %s is skipped: %s', name, reason)
    return BACKENDS['native']


def prefers_transform(
        x: torch.Tensor,
        weight: torch.Tensor,
        before: Sequence[int],
        groups: int,
        keeps: bool,
) -> bool:
    """Whether a convolution over channels is cheaper by FFT than directly: output and gradients, by counting.

    Args:
        x: (B, I, *L).
        weight: (O, I / groups, *K).
        before: Zeros in front of x, for each dimension.
        groups: Of the channels.
        keeps: Whether the kernel's transform is there already.
    """
    (batch, inputs), size = x.shape[:2], x.shape[2:]
    (outputs, per_group), kernel_size = weight.shape[:2], weight.shape[2:]
    products = batch * outputs * per_group
    direct, frequencies = products, 1
    for n, k, p in zip(size, kernel_size, before):
        direct *= n * k
        frequencies *= n + max(p, k - 1 - p)
    frequencies //= 2
    transformed = batch * (inputs + outputs) + (0 if keeps else outputs * per_group)
    if x.device.type == 'cpu':
        # In multiplications of a direct convolution, 0.028 ns each on one core with AVX2: a complex product, an entry
        # of a spectrum there and back, a call. Output and gradients, direct and by FFT, ms:
        # (64, 48, 32, 32), 3×3: 139, 304, 5×5: 301, 334; batch 16, 9×9: 246, 118; batch 1, 33×33: 522, 156;
        # (64, 30, 784), 5 taps: 35, 77, 20: 209, 90; batch 1, 60: 13, 18, 784: 181, 31.
        return direct > frequencies * (7 * products + 350 * len(before) * transformed) + 1e7 * groups
    # No GPU has timed it. It is chosen where a direct convolution is hopeless: 10 times the arithmetic.
    return direct > 10 * frequencies * (4 * products + 60 * transformed)


def margins(x: torch.Tensor, k: int, l: int) -> Tuple[int, int]:
    """Rows and columns on every side of a K×L kernel that meet nothing but padding: cropping them is exact."""
    return max(0, k // 2 - x.shape[2] + 1), max(0, l // 2 - x.shape[3] + 1)


def working_dtype(x: torch.Tensor, l: int) -> torch.dtype:
    """float32 for half precision where that is faster than what PyTorch does by itself, else the dtype of x."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return x.dtype
    # Without oneDNN a float16 convolution takes 70 times as long as in float32 (C 64, 28×28, 27×27: 95 ms and 1.3).
    # In bfloat16, with 2 to 16 channels, at least 32 columns and a kernel wider than 14, oneDNN 3.12 never returns.
    if x.dtype not in ONEDNN_DTYPES or (x.shape[1] <= 16 and l > 14):
        return torch.float32
    return x.dtype


def uses_native_input_gradient(grad: torch.Tensor, l: int) -> bool:
    """Whether the input gradient is faster by PyTorch's own than as a convolution with the flipped kernel.

    C 768, 7×7, 13×13, channels_last, batch 16: native 1.6 ms, flipped 2.2; contiguous, batch 2: 0.21 and 0.28, but
    C 192, 28×28: 1.36 and 1.01. 9×9: as fast or slower.
    """
    small = memory_format(grad) == torch.channels_last or grad.shape[2] * grad.shape[3] <= 49
    return grad.numel() > 0 and small and 9 < l <= WIDEST and grad.dtype in ONEDNN_DTYPES


def memory_format(x: torch.Tensor) -> torch.memory_format:
    """channels_last if x (B, C, H, W) has that layout and no other, else contiguous."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format
