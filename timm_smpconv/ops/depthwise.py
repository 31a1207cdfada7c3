"""Depthwise convolution with large kernels: stride 1, "same" zero padding, odd kernels.

Shapes: B batch, C channels, H and W height and width, K and L height and width of the kernel.

Two operators are closed under differentiation, so that every derivative of every order is one of them again:

    y  = conv(x, w)          y[b,c,i,j]  = Σ_kl  w[c,k,l] x[b,c,i+k-K//2,j+l-L//2]
    dx = conv(g, flip(w))
    dw = corr(g, x)          dw[c,k,l]   = Σ_bij g[b,c,i,j] x[b,c,i+k-K//2,j+l-L//2]

Taps that meet nothing but padding (a kernel longer than 2H - 1) are cropped away first, which is exact.
"""
import importlib.util
import logging
import os
from contextlib import contextmanager
from typing import Callable, Dict, FrozenSet, Iterator, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function

__all__ = ['BACKENDS', 'depthwise_conv2d', 'use_backend']

_logger = logging.getLogger(__name__)
_TORCH = tuple(int(part) for part in torch.__version__.split('.')[:2])
_forced: Optional[str] = None


def depthwise_conv2d(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    """`F.conv2d(x, weight, bias, padding=(K // 2, L // 2), groups=C)`, fast for large kernels too.

    Differentiable any number of times in x, weight and bias. The result has the memory format of x. Under
    `torch.export`, TorchScript and tracing it is that `F.conv2d`.

    Args:
        x: (B, C, H, W).
        weight: (C, 1, K, L) with odd K and L.
        bias: (C,).

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: A shape or a device breaks the rules above, or the backend forced by `use_backend` cannot run.
        TypeError: The dtypes differ (outside autocast) or are not floating point.
    """
    if torch.jit.is_scripting():
        padding = [weight.shape[2] // 2, weight.shape[3] // 2]
        return F.conv2d(x, weight, bias, padding=padding, groups=weight.shape[0])
    inputs = (x, weight) if bias is None else (x, weight, bias)
    if has_torch_function(inputs):
        return handle_torch_function(depthwise_conv2d, inputs, x, weight, bias)
    device_type, mixed = x.device.type, False
    if device_type != 'meta' and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        x, mixed = _autocast(x, dtype), _forced == 'triton'
        if not mixed:  # Triton's programs round the weight themselves, and return its gradient unrounded.
            weight = _autocast(weight, dtype)
            bias = None if bias is None else _autocast(bias, dtype)
    if not torch.jit.is_tracing():
        _check(x, weight, bias, mixed)
    if _stays_native(x):
        return _native(x, weight, bias)
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    if torch.compiler.is_compiling():
        if recorded:
            return torch.ops.timm_smpconv.depthwise_conv2d(x, weight, bias, _forced)
    elif recorded or torch._C._are_functorch_transforms_active():
        return _Conv.apply(x, weight, bias, _forced)
    # Nothing is recorded: without 0.15 ms for the operator, and compilers see what it is made of.
    return _conv(x, weight, bias, _forced)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one of `BACKENDS` for all passes of the convolutions called inside, their backward included.

    Raises:
        ValueError: There is no such backend; or, from the convolution, the reason why it cannot run.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f'name must be one of {", ".join(BACKENDS)}, got {name!r}')
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def _autocast(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t


def _exporting() -> bool:
    """Whether a graph is captured to leave PyTorch, in which the operator has to be a standard convolution."""
    if torch.jit.is_tracing():
        return True
    if not torch.compiler.is_compiling():
        return False
    # torch.export traces Python itself by default; with strict=True it goes through the compiler, like torch.compile,
    # and older versions call either of them exporting (seen with torch 2.7; right in 2.15).
    return not torch.compiler.is_dynamo_compiling() or (_TORCH >= (2, 15) and torch.compiler.is_exporting())


def _stays_native(x: torch.Tensor) -> bool:
    """Whether it is plainly `F.conv2d`: in graphs to be exported, and on devices where nothing else was measured."""
    if _forced == 'native':
        return True
    exporting = _exporting()
    if exporting and _forced is not None:
        raise ValueError(f'backend {_forced!r} was forced and cannot run: a graph to be exported holds F.conv2d')
    return exporting or (_forced is None and x.device.type != 'cpu')


def _check(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor], mixed: bool = False) -> None:
    if x.ndim != 4:
        raise ValueError(f'x must be (B, C, H, W), got shape {tuple(x.shape)}')
    if weight.ndim != 4 or weight.shape[0] != x.shape[1] or weight.shape[1] != 1:
        raise ValueError(f'weight must be (C, 1, K, L) with C = {x.shape[1]} as in x, got shape {tuple(weight.shape)}')
    if weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
        raise ValueError(f'weight must have odd K and L, got shape {tuple(weight.shape)}')
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f'bias must be (C,) = ({weight.shape[0]},), got shape {tuple(bias.shape)}')
    if not x.is_floating_point():
        raise TypeError(f'x must be floating point, got {x.dtype}')
    for name, t in (('weight', weight), ('bias', bias)):
        if t is not None and t.dtype != x.dtype and not (mixed and t.dtype == torch.float32):
            raise TypeError(f'{name} must have the dtype of x, {x.dtype}, got {t.dtype}')
        if t is not None and t.device != x.device:
            raise ValueError(f'{name} must be on the device of x, {x.device}, got {t.device}')


def _memory_format(x: torch.Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def _margins(x: torch.Tensor, k: int, l: int) -> Tuple[int, int]:
    """Rows and columns on every side of a K×L kernel that meet nothing but padding."""
    return max(0, k // 2 - x.shape[2] + 1), max(0, l // 2 - x.shape[3] + 1)


def _fft_length(n: int, k: int) -> int:
    """The smallest fast transform length at which "same" convolution does not wrap around: even, of small primes.

    (4, 384, 14, 14), `rfft2`: at 27 2.3 ms, at 28 1.4; (4, 192, 28, 28): at 45 3.1, at 48 2.4.
    """
    n += k // 2
    n += n % 2
    while True:
        rest = n
        for prime in (2, 3, 5, 7):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 2


def _native(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    return F.conv2d(x, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2), groups=weight.shape[0])


def _native_corr(grad: torch.Tensor, x: torch.Tensor, k: int, l: int) -> torch.Tensor:
    weight = x.new_empty(1).expand(x.shape[1], 1, k, l)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, (1, 1), (k // 2, l // 2), (1, 1), False, (0, 0), x.shape[1], (False, True, False))[1]


def _contiguous(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    return _native(x.contiguous(), weight, bias)


def _contiguous_corr(grad: torch.Tensor, x: torch.Tensor, k: int, l: int) -> torch.Tensor:
    return _native_corr(grad.contiguous(), x.contiguous(), k, l)


def _channels_last(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    return _native(x.contiguous(memory_format=torch.channels_last), weight, bias)


def _channels_last_corr(grad: torch.Tensor, x: torch.Tensor, k: int, l: int) -> torch.Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    grad, x = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (grad, x))
    return _native_corr(grad, x, k, l)


def _fft_chunks(x: torch.Tensor, size: Tuple[int, int]) -> Iterator[slice]:
    """The batch in pieces of about 1 MiB of spectrum: larger ones leave the cache and, on Linux, cost page faults.

    C 384, 14×14, 27×27, batch 16, weight gradient: 22 ms, 49 in one piece; C 64, 56×56, 51×51, output: 34 ms, 41.
    """
    if torch.compiler.is_compiling() or x.device.type != 'cpu':
        yield slice(None)
        return
    n = max(1, 2 ** 20 // (x.shape[1] * size[0] * (size[1] // 2 + 1) * 8))
    for start in range(0, x.shape[0], n):
        yield slice(start, start + n)


def _fft(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    k, l = weight.shape[2:]
    h, w = x.shape[2:]
    size = (_fft_length(h, k), _fft_length(w, l))
    dtype = torch.promote_types(x.dtype, torch.float32)
    kernel = F.pad(weight[:, 0].to(dtype), (0, size[1] - l, 0, size[0] - k)).roll((-(k // 2), -(l // 2)), (1, 2))
    # conj_physical, as a lazy conj() is not resolved when a compiled graph calls the operator (torch 2.15).
    kernel = torch.fft.rfft2(kernel).conj_physical_()
    y = torch.empty_like(x)
    for chunk in _fft_chunks(x, size):
        spectrum = torch.fft.rfft2(x[chunk].to(dtype).contiguous(), s=size).mul_(kernel)
        piece = torch.fft.irfft2(spectrum, s=size)[:, :, :h, :w]
        y[chunk] = piece if bias is None else piece.add_(bias[:, None, None])
    return y


def _fft_corr(grad: torch.Tensor, x: torch.Tensor, k: int, l: int) -> torch.Tensor:
    size = (_fft_length(x.shape[2], k), _fft_length(x.shape[3], l))
    dtype = torch.promote_types(x.dtype, torch.float32)
    total = None
    for chunk in _fft_chunks(x, size):
        spectrum = torch.fft.rfft2(grad[chunk].to(dtype).contiguous(), s=size).conj_physical_()
        spectrum = spectrum.mul_(torch.fft.rfft2(x[chunk].to(dtype).contiguous(), s=size)).sum(0)
        total = spectrum if total is None else total.add_(spectrum)
    lags = torch.fft.irfft2(total, s=size).roll((k // 2, l // 2), (1, 2))
    return lags[:, None, :k, :l]


class Backend(NamedTuple):
    """One way to compute the convolution and the correlation of its weight gradient, on tensors that are not empty."""
    conv: Callable[[torch.Tensor, torch.Tensor, Optional[torch.Tensor]], torch.Tensor]
    corr: Callable[[torch.Tensor, torch.Tensor, int, int], torch.Tensor]
    cannot_run: Callable[[torch.Tensor], Optional[str]]  # the reason, if there is one


def _anywhere(x: torch.Tensor) -> Optional[str]:
    return None


def _needs_cpu_or_cuda(x: torch.Tensor) -> Optional[str]:
    if x.device.type not in ('cpu', 'cuda', 'meta'):
        return f'fft runs on cpu and cuda only, x is on {x.device}'
    return None


def _triton(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    from . import depthwise_triton  # where Triton is installed alone
    return depthwise_triton.conv(x, weight, bias)


def _triton_corr(grad: torch.Tensor, x: torch.Tensor, k: int, l: int) -> torch.Tensor:
    from . import depthwise_triton
    return depthwise_triton.corr(grad, x, k, l)


def _needs_triton(x: torch.Tensor) -> Optional[str]:
    if x.device.type not in ('cuda', 'meta') and os.environ.get('TRITON_INTERPRET') != '1':
        return f'triton runs on cuda only (elsewhere in its interpreter, with TRITON_INTERPRET=1), x is on {x.device}'
    if importlib.util.find_spec('triton') is None:
        return 'triton is not installed'
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f'triton computes float32, bfloat16 and float16, x is {x.dtype}'
    if x.shape[3] > 128:
        return f'triton takes maps of at most 128 columns, x has {x.shape[3]}'
    return None


BACKENDS: Dict[str, Backend] = {
    'native': Backend(_native, _native_corr, _anywhere),
    'contiguous': Backend(_contiguous, _contiguous_corr, _anywhere),
    'channels_last': Backend(_channels_last, _channels_last_corr, _anywhere),
    'fft': Backend(_fft, _fft_corr, _needs_cpu_or_cuda),
    'triton': Backend(_triton, _triton_corr, _needs_triton),  # chosen nowhere before it is measured
}


def _onednn_dtypes() -> FrozenSet[torch.dtype]:
    """The dtypes in which PyTorch convolves by oneDNN on this machine; none in a PyTorch without it."""
    if not torch.backends.mkldnn.is_available():
        return frozenset()
    half = {torch.bfloat16: '_is_mkldnn_bf16_supported', torch.float16: '_is_mkldnn_fp16_supported'}
    supported = [dtype for dtype, name in half.items() if getattr(torch.ops.mkldnn, name, bool)()]
    return frozenset([torch.float32, *supported])


_ONEDNN_DTYPES = _onednn_dtypes()
# The widest kernel of oneDNN's own depthwise program; wider ones it runs fast in channels_last alone. C 192, 28×28,
# batch 4, contiguous: with AVX-512 13×13 takes 6.1 ms and 15×15 61, with AVX2 9×9 0.9 and 11×11 25, without 7×7 4.3 and
# 9×9 21.
_WIDEST = {'AVX512': 13, 'AVX2': 9}.get(torch.backends.cpu.get_cpu_capability(), 7)


class Case(NamedTuple):
    """What the choice depends on, K and L after cropping."""
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
    """When a backend is chosen on the CPU; the first rule that holds decides."""
    backend: str
    holds: Callable[[Case], bool]
    evidence: str  # ms, 2 cores, AVX-512, torch 2.15 and 2.14, batch 4 in float32 unless said; `benchmarks.cpu rules`


# Without oneDNN there is a loop that prefers NCHW.
CONV_RULES = (
    Rule('fft', lambda case: not case.onednn and case.k * case.l >= 49,
         'float64, batch 1, C 40, 28×28, 27×27: native 46, channels_last 106, fft 1.9; 14×14, 7×7: 2.1, 4.2, 0.5'),
    Rule('native', lambda case: not case.onednn,
         'float64, batch 1, C 40, 14×14, 5×5: native 1.1, channels_last 2.3, fft 0.4; C 3: 0.12, 0.22, 0.17'),
    Rule('native', lambda case: case.l <= min(11, _WIDEST),
         'C 96, 56×56, 5×5: native 9.4, channels_last 15; with channels_last input, 11×11: native 4.5, contiguous 24'),
    Rule('contiguous', lambda case: case.l <= _WIDEST,
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
         'channels_last input, C 96, 56×56, 5×5: native 6.3, fft 8.7; contiguous: native 14, channels_last 7.4, fft 5.3'),
    Rule('fft', lambda case: True,
         'C 96, 56×56, 31×31: native 1531, channels_last 1923, fft 11; 7×7: 11, 11, 9.5; 768, 7×7, 7×7: 5.9, 16, 3.1'),
)


def _choose(rules: Tuple[Rule, ...], x: torch.Tensor, k: int, l: int) -> str:
    case = Case(x.dtype in _ONEDNN_DTYPES, _memory_format(x) == torch.channels_last, *x.shape, k, l)
    return next(rule.backend for rule in rules if rule.holds(case))


def _working_dtype(x: torch.Tensor, l: int) -> torch.dtype:
    """float32 for half precision where that is faster than what PyTorch does by itself, else the dtype of x."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return x.dtype
    # Without oneDNN a float16 convolution takes 70 times as long as in float32 (C 64, 28×28, 27×27: 95 ms and 1.3).
    # In bfloat16, with 2 to 16 channels, at least 32 columns and a kernel wider than 14, oneDNN 3.12 never returns.
    if x.dtype not in _ONEDNN_DTYPES or (x.shape[1] <= 16 and l > 14):
        return torch.float32
    return x.dtype


def _resolve(choice: str, forced: Optional[str], x: torch.Tensor) -> Backend:
    if forced is not None:
        reason = BACKENDS[forced].cannot_run(x)
        if reason is not None:
            raise ValueError(f'backend {forced!r} was forced and cannot run: {reason}')
        return BACKENDS[forced]
    reason = BACKENDS[choice].cannot_run(x)
    if reason is not None:
        _logger.debug('backend %s is passed over: %s', choice, reason)
        return BACKENDS['native']
    return BACKENDS[choice]


def _conv(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        forced: Optional[str],
) -> torch.Tensor:
    memory_format, dtype = _memory_format(x), x.dtype
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=memory_format)
    dy, dx = _margins(x, weight.shape[2], weight.shape[3])
    if dy or dx:
        weight = weight[:, :, dy:weight.shape[2] - dy, dx:weight.shape[3] - dx]
    if forced is None:
        working = _working_dtype(x, weight.shape[3])
        x, weight, bias = x.to(working), weight.to(working), None if bias is None else bias.to(working)
    backend = _resolve(_choose(CONV_RULES, x, weight.shape[2], weight.shape[3]), forced, x)
    return backend.conv(x, weight, bias).to(dtype).contiguous(memory_format=memory_format)


def _corr(
        grad: torch.Tensor,
        x: torch.Tensor,
        k: int,
        l: int,
        forced: Optional[str],
        dtype: Optional[torch.dtype],
) -> torch.Tensor:
    dtype = dtype or x.dtype
    if x.numel() == 0:
        return x.new_zeros(x.shape[1], 1, k, l, dtype=dtype)
    dy, dx = _margins(x, k, l)
    if forced is None:
        working = _working_dtype(x, l - 2 * dx)
        grad, x = grad.to(working), x.to(working)
    backend = _resolve(_choose(CORR_RULES, x, k - 2 * dy, l - 2 * dx), forced, x)
    dw = backend.corr(grad, x, k - 2 * dy, l - 2 * dx)
    return F.pad(dw, (dx, dx, dy, dy)).to(dtype).contiguous()


def _input_gradient(
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        forced: Optional[str],
) -> torch.Tensor:
    """The convolution with the flipped kernel, natively where that is faster.

    C 768, 7×7, 13×13, channels_last, batch 16: native 1.6 ms, flipped 2.2; contiguous, batch 2: 0.21 and 0.28, but
    C 192, 28×28: 1.36 and 1.01. 9×9: as fast or slower.
    """
    l, layout = weight.shape[3], _memory_format(grad)
    small = layout == torch.channels_last or grad.shape[2] * grad.shape[3] <= 49
    if forced is None and grad.numel() and small and 9 < l <= _WIDEST and grad.dtype in _ONEDNN_DTYPES:
        dx = torch.ops.aten.convolution_backward(
            grad, x, weight, None, (1, 1), (weight.shape[2] // 2, l // 2), (1, 1), False, (0, 0), x.shape[1],
            (True, False, False))[0]
        return dx.contiguous(memory_format=layout)
    return _conv(grad, weight.flip(2, 3), None, forced)


@torch.library.custom_op('timm_smpconv::depthwise_conv2d', mutates_args=())
def _conv_op(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        backend: Optional[str],
) -> torch.Tensor:
    return _conv(x, weight, bias, backend)


@torch.library.custom_op('timm_smpconv::depthwise_corr2d', mutates_args=())
def _corr_op(
        grad: torch.Tensor,
        x: torch.Tensor,
        k: int,
        l: int,
        backend: Optional[str],
        dtype: Optional[torch.dtype] = None,
) -> torch.Tensor:
    return _corr(grad, x, k, l, backend, dtype)


@_conv_op.register_fake
def _(x, weight, bias, backend):
    return torch.empty_like(x, memory_format=_memory_format(x))


@_corr_op.register_fake
def _(grad, x, k, l, backend, dtype=None):
    return x.new_empty(x.shape[1], 1, k, l, dtype=dtype or x.dtype)


# The operators are opaque to compilers and carry their derivatives (torch.library); the autograd functions around them
# carry the same ones to torch.func, which torch.library's cannot reach.


def _recorded(grad: torch.Tensor) -> bool:
    """Whether a graph, a compiler or a transform has to see what a backward does."""
    return torch.is_grad_enabled() or type(grad) is not torch.Tensor or torch._C._are_functorch_transforms_active()


def _conv_context(ctx, inputs, output) -> None:
    x, weight, bias, ctx.backend = inputs
    ctx.save_for_backward(x, weight)
    ctx.save_for_forward(x, weight)


def _conv_backward(ctx, grad):
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
    recorded, dx = _recorded(grad), None
    if needs_x and recorded:
        dx = _Conv.apply(grad, weight.flip(2, 3), None, ctx.backend)
    elif needs_x:
        dx = _input_gradient(grad, x, weight, ctx.backend)
    corr = _Corr.apply if recorded else _corr
    return (
        dx,
        corr(grad, x, weight.shape[2], weight.shape[3], ctx.backend, weight.dtype) if needs_weight else None,
        grad.sum((0, 2, 3)) if needs_bias else None,
        None,
    )


def _corr_context(ctx, inputs, output) -> None:
    grad, x, ctx.k, ctx.l, ctx.backend, ctx.dtype = inputs
    ctx.save_for_backward(grad, x)
    ctx.save_for_forward(grad, x)


def _corr_backward(ctx, v):
    grad, x = ctx.saved_tensors
    needs_grad, needs_x = ctx.needs_input_grad[:2]
    conv = _Conv.apply if _recorded(v) else _conv
    return (
        conv(x, v, None, ctx.backend) if needs_grad else None,
        conv(grad, v.flip(2, 3), None, ctx.backend) if needs_x else None,
        None, None, None, None,
    )


def _first(t: torch.Tensor, dim: Optional[int], size: int) -> torch.Tensor:
    """The mapped dimension in front, of its full size."""
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def _into_channels(t: torch.Tensor) -> torch.Tensor:
    """(N, B, C, H, W) → (B, N * C, H, W)."""
    return t.movedim(0, 1).flatten(1, 2)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias, backend):
        return torch.ops.timm_smpconv.depthwise_conv2d(x, weight, bias, backend)

    setup_context = staticmethod(_conv_context)
    backward = staticmethod(_conv_backward)

    @staticmethod
    def jvp(ctx, dx, dweight, dbias, _):
        x, weight = ctx.saved_tensors
        terms = [] if dx is None else [_Conv.apply(dx, weight, None, ctx.backend)]
        terms += [] if dweight is None else [_Conv.apply(x, dweight, None, ctx.backend)]
        terms += [] if dbias is None else [dbias[:, None, None].expand_as(x)]
        return sum(terms)

    @staticmethod
    def vmap(info, in_dims, x, weight, bias, backend):
        n = info.batch_size
        if in_dims[1] is None and in_dims[2] is None:
            y = _Conv.apply(x.movedim(in_dims[0], 0).flatten(0, 1), weight, bias, backend)
            return y.unflatten(0, (n, -1)), 0
        x, weight = _first(x, in_dims[0], n), _first(weight, in_dims[1], n)
        bias = None if bias is None else _first(bias, in_dims[2], n).flatten()
        y = _Conv.apply(_into_channels(x), weight.flatten(0, 1), bias, backend)  # (B, N * C, H, W)
        return y.unflatten(1, (n, -1)), 1


class _Corr(torch.autograd.Function):
    @staticmethod
    def forward(grad, x, k, l, backend, dtype):
        return torch.ops.timm_smpconv.depthwise_corr2d(grad, x, k, l, backend, dtype)

    setup_context = staticmethod(_corr_context)
    backward = staticmethod(_corr_backward)

    @staticmethod
    def jvp(ctx, dgrad, dx, *_):
        grad, x = ctx.saved_tensors
        terms = [] if dgrad is None else [_Corr.apply(dgrad, x, ctx.k, ctx.l, ctx.backend, ctx.dtype)]
        terms += [] if dx is None else [_Corr.apply(grad, dx, ctx.k, ctx.l, ctx.backend, ctx.dtype)]
        return sum(terms)

    @staticmethod
    def vmap(info, in_dims, grad, x, k, l, backend, dtype):
        n = info.batch_size
        grad, x = _first(grad, in_dims[0], n), _first(x, in_dims[1], n)
        dw = _Corr.apply(_into_channels(grad), _into_channels(x), k, l, backend, dtype)  # (N * C, 1, K, L)
        return dw.unflatten(0, (n, -1)), 0


_conv_op.register_autograd(_conv_backward, setup_context=_conv_context)
_corr_op.register_autograd(_corr_backward, setup_context=_corr_context)
