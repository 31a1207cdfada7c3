"""Which backend computes a convolution: the requested one, the cheapest by `costs`, or the winner of a `race`.

Shapes: B batch, C channels, H and W height and width, K and L height and width of the kernel.
"""
import logging
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Callable, Generator, Optional, Sequence, Tuple

import torch

from . import costs, cpu, race
from .backends import BACKENDS, RACED, Backend

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


PASSES = ('output', 'input gradient', 'weight gradient')


def choose(
        what: str,
        x: torch.Tensor,
        k: int,
        l: int,
        transform: bool = True,
        is_transformed: bool = False,
) -> str:
    """The name of the backend that is expected to be the fastest for x on the CPU.

    Args:
        what: One of `PASSES`.
        x: (B, C, H, W), the input or, for its gradient, the gradient of the output.
        k: Height of the kernel.
        l: Width of the kernel.
        transform: Whether 'fft' is allowed.
        is_transformed: Whether the transform of x is there already.
    """
    case = case_of(what, x, k, l)
    if case.k * case.l <= 9 or min(case.k, case.l) == 1:
        return 'native'
    times = costs.expected(case, is_transformed)
    if not transform:
        del times['fft']
    return min(times, key=times.__getitem__)


def case_of(what: str, x: torch.Tensor, k: int, l: int) -> costs.Case:
    """The case of a pass over x with a K×L kernel."""
    dy, dx = margins(x, k, l)
    k, l = k - 2 * dy, l - 2 * dx
    dtype = working_dtype(x, l)
    onednn = dtype in cpu.HERE.onednn and bool(torch.backends.mkldnn.enabled)
    b, c, h, w = x.shape
    return costs.Case(what, onednn, memory_format(x) == torch.channels_last, dtype.itemsize, b, c, h, w, k, l)


def select(
        what: str,
        x: torch.Tensor,
        size: Sequence[int],
        requested: Optional[str],
        trusts_transform: Callable[[], bool],
        is_transformed: bool = False,
) -> str:
    """The name of the backend for one pass: the requested one, or the expected to be fastest, or 'native'.

    Args:
        what: One of `PASSES`.
        x: (B, C, H, W), the input or, for its gradient, the gradient of the output.
        size: (K, L), after cropping.
        requested: A backend.
        trusts_transform: Whether a transform is accurate for these values, see `backends.fft`.
        is_transformed: Whether the transform of x is there already.

    Raises:
        ValueError: The requested backend cannot run.
    """
    if requested is None and x.device.type != 'cpu':
        return 'native'
    k, l = size
    name = requested or choose(what, x, k, l, is_transformed=is_transformed)
    if name == 'fft' and not requested and not trusts_transform():
        name = choose(what, x, k, l, transform=False)
    reason = BACKENDS[name].unsupported(x)
    if reason is None:
        return name
    if requested:
        raise ValueError(f'backend {name!r} was requested and cannot run: {reason}')
    _logger.debug('backend %s is skipped: %s', name, reason)
    return 'native'


def compute(
        what: str,
        x: torch.Tensor,
        size: Sequence[int],
        requested: Optional[str],
        run: Callable[[Backend], torch.Tensor],
        trusts_transform: Callable[[], bool],
        grad: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """One pass by the backend that `select` names or, where they race, by the one that won.

    Args:
        what: See `select`.
        x: See `select`.
        size: See `select`.
        requested: See `select`.
        run: Computes the pass by a backend, in the format and dtype of the result.
        trusts_transform: See `select`.
        grad: The gradient of the output, for a weight gradient.
    """
    if not races(x, requested):
        return run(BACKENDS[select(what, x, size, requested, trusts_transform)])
    candidates = {name: partial(run, backend) for name, backend in RACED.items() if backend.unsupported(x) is None}
    return race.compute(race.make_key(what, x, size[0], size[1], grad), candidates, _tolerance(x.dtype))


def _tolerance(dtype: torch.dtype) -> float:
    """The largest difference of two backends, relative to the largest value."""
    if dtype == torch.float32 and 'tf32' in (
            torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
            torch.backends.cuda.matmul.fp32_precision):
        return 5e-3
    return {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3}.get(dtype, 3e-2)


def races(x: torch.Tensor, requested: Optional[str]) -> bool:
    """Whether backends race for a pass over x."""
    return requested is None and race.is_allowed(x)


def prefers_transform(
        x: torch.Tensor,
        weight: torch.Tensor,
        before: Sequence[int],
        groups: int,
        keeps: bool,
) -> bool:
    """Whether a convolution over channels is expected to take less time by FFT than directly: output and gradients.

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
        # A complex product costs 7 multiplications, an entry of a spectrum 50 units of a transform, there and back, and
        # a call 0.3 ms. Output and gradients on one core with AVX2, direct and by FFT, ms:
        # (64, 48, 32, 32), 3×3: 139, 304, 5×5: 301, 334; batch 16, 9×9: 246, 118; batch 1, 33×33: 522, 156;
        # (64, 30, 784), 5 taps: 35, 77, 20: 209, 90; batch 1, 60: 13, 18, 784: 181, 31.
        rates = costs.rates()
        spectra = 7 * rates.dense * products + 50 * rates.transform * len(before) * transformed
        return rates.dense * direct > frequencies * spectra + 3e5 * groups
    # No GPU has timed it. It is chosen where a direct convolution is hopeless: 10 times the arithmetic.
    return direct > 10 * frequencies * (4 * products + 60 * transformed)


def margins(x: torch.Tensor, k: int, l: int) -> Tuple[int, int]:
    """Rows and columns on every side of a K×L kernel that meet nothing but padding: cropping them is exact."""
    return max(0, k // 2 - x.shape[2] + 1), max(0, l // 2 - x.shape[3] + 1)


def working_dtype(x: torch.Tensor, l: int) -> torch.dtype:
    """float32 for half precision where that is faster than what PyTorch does by itself, else the dtype of x."""
    if x.dtype not in (torch.bfloat16, torch.float16) or x.device.type != 'cpu':
        return x.dtype
    # Without oneDNN a float16 convolution takes 70 times as long as in float32 (C 64, 28×28, 27×27: 95 ms and 1.3).
    # In bfloat16, with 2 to 16 channels, at least 32 columns and a kernel wider than 14, oneDNN 3.12 never returns.
    if x.dtype not in cpu.HERE.onednn or (x.shape[1] <= 16 and l > 14):
        return torch.float32
    return x.dtype


def memory_format(x: torch.Tensor) -> torch.memory_format:
    """channels_last if x (B, C, H, W) has that layout and no other, else contiguous."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format
