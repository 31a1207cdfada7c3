"""Convolutions over channels with kernels as large as the input: causal in one dimension, "same" in two.

Shapes: B batch, I and O channels in and out, L length and K taps (1-D), H and W height and width, KH and KW those
of the kernel (2-D).
"""
from functools import partial
from typing import Any, Dict, List, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function

from . import _private
from .autograd.dense import Conv
from .backends import fft, spectra
from .depthwise import autocast, check_types
from .dispatch.choose import choose_over_channels
from .dispatch.geometry import memory_format
from .dispatch.kept import Kept
from .dispatch.request import check_exportable, is_exporting, requested, requested_backend

__all__ = ['causal_conv1d', 'large_conv2d', 'measure_dense']

# An output that sees less than a 16th of the largest value is computed again. The error of an FFT over 1,000 samples is
# 4e-7 of its largest value, so that of an output is less than 1e-5 of what it sees, down to 16⁻⁶ of the largest.
_LEVEL, _LEVELS = 16, 6


def causal_conv1d(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor] = None,
        groups: int = 1,
        backend: Optional[str] = None,
        kept: Optional[Any] = None,  # TorchScript cannot read `Kept`
) -> torch.Tensor:
    """`F.conv1d(F.pad(x, (K - 1, 0)), weight, bias, groups=groups)`, fast for kernels as long as the sequence.

    Differentiable any number of times in x, weight and bias. It is computed directly or by FFT, whichever costs less by
    a count of operations. In graphs that leave PyTorch (`torch.export`, TorchScript, tracing) it is that `F.conv1d`.

    The errors of an FFT are relative to the largest value of the sequence, later samples included. An eager call on a
    CPU without backend='fft' therefore computes outputs again that see, in the K samples up to their own, less than a
    16th of that value, without the larger ones. In float32, the error of an output is then less than 1e-5 of the
    largest value that it sees (times the norm of its weights), unless that is below 1e-7 of the sequence's.

    Args:
        x: (B, I, L).
        weight: (O, I / groups, K), any K: taps older than the sequence meet nothing but padding.
        bias: (O,).
        groups: Of `F.conv1d`.
        backend: 'native' or 'fft' for this call and its gradients.
        kept: A `Kept`, which holds the kernel's transform from one call to the next, where nothing is recorded or
            compiled and the weight does not require gradients.

    Returns:
        (B, O, L).

    Raises:
        ValueError: A shape or a device breaks the rules above, or the requested backend cannot run.
        TypeError: The dtypes differ (outside autocast) or are not floating point.

    Example:
        >>> x, weight = torch.randn(2, 3, 1000), torch.randn(4, 3, 1000)
        >>> y = causal_conv1d(x, weight)
        >>> torch.allclose(y, F.conv1d(F.pad(x, (999, 0)), weight), atol=1e-3)
        True
    """
    if torch.jit.is_scripting():
        return F.conv1d(F.pad(x, [weight.shape[2] - 1, 0]), weight, bias, groups=groups)
    inputs = (x, weight) if bias is None else (x, weight, bias)
    if has_torch_function(inputs):
        return handle_torch_function(causal_conv1d, inputs, x, weight, bias, groups, backend, kept)
    return _convolve(x, weight, bias, groups, backend, kept, causal=True)


def large_conv2d(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor] = None,
        backend: Optional[str] = None,
        kept: Optional[Any] = None,  # TorchScript cannot read `Kept`
) -> torch.Tensor:
    """`F.conv2d(x, weight, bias, padding=(KH // 2, KW // 2))`, fast for kernels as large as the map.

    Differentiable any number of times in x, weight and bias. It is computed directly or by FFT, whichever costs less by
    a count of operations. The errors of an FFT are relative to the largest value of the image. An eager call on a CPU
    computes images directly whose largest value is more than 64 times the mean magnitude of their other nonzero values,
    but not those of which a whole part is much larger than the rest. In graphs that leave PyTorch (`torch.export`,
    TorchScript, tracing) it is that `F.conv2d`. The result of an FFT has the memory format of x.

    Args:
        x: (B, I, H, W).
        weight: (O, I, KH, KW) with odd KH and KW.
        bias: (O,).
        backend: 'native', 'contiguous', 'channels_last' or 'fft' for this call and its gradients.
        kept: A `Kept`, which holds the kernel's transform from one call to the next, where nothing is recorded or
            compiled and the weight does not require gradients.

    Returns:
        (B, O, H, W).

    Raises:
        ValueError: A shape or a device breaks the rules above, or the requested backend cannot run.
        TypeError: The dtypes differ (outside autocast) or are not floating point.

    Example:
        >>> x, weight = torch.randn(2, 3, 16, 16), torch.randn(4, 3, 17, 17)
        >>> torch.allclose(large_conv2d(x, weight), F.conv2d(x, weight, padding=8), atol=1e-3)
        True
    """
    if torch.jit.is_scripting():
        return F.conv2d(x, weight, bias, padding=[weight.shape[2] // 2, weight.shape[3] // 2])
    inputs = (x, weight) if bias is None else (x, weight, bias)
    if has_torch_function(inputs):
        return handle_torch_function(large_conv2d, inputs, x, weight, bias, backend, kept)
    return _convolve(x, weight, bias, 1, backend, kept, causal=False)


class _Call(NamedTuple):
    """A convolution without taps that meet nothing but padding.

    Attributes:
        weight: (O, I / groups, *K).
        bias: (O,).
        before: Zeros in front of the input, for each dimension.
        groups: Of the channels.
        kept: Where the kernel's transform is kept.
    """
    weight: torch.Tensor
    bias: Optional[torch.Tensor]
    before: List[int]
    groups: int
    kept: Optional[Kept]


def _convolve(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        groups: int,
        backend: Optional[str],
        kept: Optional[Kept],
        causal: bool,
) -> torch.Tensor:
    """Causal in one dimension, or "same" in two."""
    backend = requested(backend)
    x, weight, bias = _in_autocast(x, weight, bias)
    if not torch.jit.is_tracing():
        _check(x, weight, bias, groups, causal)
    if is_exporting():
        check_exportable(backend)
        return _direct(x, weight, bias, _before(weight), groups)
    if backend is not None:
        reason = _unsupported(backend, x)
        if reason is not None:
            raise ValueError(f'backend {backend!r} was requested and cannot run: {reason}')
    recorded = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    compiling = torch.compiler.is_compiling()
    keeps = kept is not None and groups == 1 and not recorded and not compiling and Kept.can_hold(weight)
    call = _cropped(x, weight, bias, groups, kept if keeps else None)
    if backend is not None:
        return _compute(backend, x, call)
    name = _fastest(x, call)
    if name != 'fft' or compiling or x.device.type != 'cpu' or x.numel() == 0 or (
            type(x) is not torch.Tensor or _private.transforms_active() or _private.dispatch_mode_active()):
        return _compute(name, x, call)
    # Where values are known, images or sequences with peaks are convolved directly.
    if _fits(x, call.weight):
        accurate = spectra.is_accurate(x)  # (B,)
        if not accurate.all():
            return _convolve_apart(x, call, accurate)
    return _compute_by_levels(x, call)


def measure_dense(
        kept: Kept,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        groups: int = 1,
) -> Dict[str, float]:
    """Time `causal_conv1d` or `large_conv2d` of such an input by FFT and directly, and let `kept` hold the faster one.

    Returns:
        Milliseconds. Nothing is measured, and the result empty, for tensors that are not on a CPU, several groups,
        where a backend is requested, or where a direct convolution takes too much memory.
    """
    x, weight, bias = _in_autocast(x, weight, bias)
    if x.device.type != 'cpu' or x.numel() == 0 or groups > 1 or requested_backend() or not Kept.can_hold(weight):
        return {}
    call = _cropped(x, weight, bias, groups, kept)
    if not _fits(x, call.weight):
        return {}
    candidates = {name: partial(_compute, name, x, call) for name in ('native', 'fft')}
    return kept.measure(_kind(x), candidates, candidates['native'](), x.dtype, f'x {tuple(x.shape)}')


def _kind(x: torch.Tensor) -> Any:
    """What the fastest backend depends on."""
    return x.shape, x.dtype, torch.get_num_threads()


def _fastest(x: torch.Tensor, call: _Call) -> str:
    """The backend that was measured to be the fastest, or is expected to be: 'fft' or 'native'."""
    name = None if call.kept is None else call.kept.fastest(_kind(x))
    if fft.unsupported(x) is not None:
        return 'native'
    return name or choose_over_channels(x, call.weight, call.before, call.groups, call.kept is not None)


def _convolve_apart(x: torch.Tensor, call: _Call, accurate: torch.Tensor) -> torch.Tensor:
    """By FFT where that is accurate, (B,), and directly elsewhere."""
    parts, order = [], []
    for compute, which in ((_compute_by_levels, accurate), (partial(_compute, 'native'), ~accurate)):
        if which.any():
            parts.append(compute(x[which], call))
            order.append(which.nonzero().flatten())
    return torch.cat(parts)[torch.cat(order).argsort()]


def _compute_by_levels(x: torch.Tensor, call: _Call) -> torch.Tensor:
    """By FFT; the outputs of sequences that see only small values again, without the larger and the later ones."""
    y = _compute('fft', x, call)
    if x.ndim == 4:
        return y
    apart = (call.groups, -1)  # groups of channels do not meet
    values = x.detach().unflatten(1, apart)
    loud = torch.maximum(values.amax(2), -values.amin(2)).nan_to_num(torch.inf)  # (B, groups, L), without copies of x
    seen = spectra.largest_seen(loud, call.weight.shape[2])
    level = loud.amax(2, keepdim=True)
    for _ in range(_LEVELS):
        quiet = (seen > 0) & (seen * _LEVEL < level)
        rows = quiet.flatten(1).any(1).nonzero().flatten()
        if len(rows) == 0:
            break
        level = torch.where(quiet, seen, 0).amax(2, keepdim=True)
        n = int(quiet.flatten(0, 1).any(0).nonzero()[-1]) + 1  # mostly a few: the first outputs see the fewest samples
        small = torch.where((loud <= level)[rows, :, None, :n], x[rows, :, :n].unflatten(1, apart), 0).flatten(1, 2)
        part = _cropped(small, call.weight, call.bias, call.groups, call.kept if n == x.shape[2] else None)
        again = _compute(_fastest(small, part), small, part).unflatten(1, apart)
        again = torch.where(quiet[rows, :, None, :n], again, y[rows, :, :n].unflatten(1, apart))
        y[rows, :, :n] = again.flatten(1, 2)
    return y


def _compute(backend: str, x: torch.Tensor, call: _Call) -> torch.Tensor:
    """By one backend."""
    if backend == 'fft' and x.shape[0]:
        return _compute_by_fft(x, call)
    layout = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}.get(backend)
    weight, bias, before, groups, _ = call
    dtype = x.dtype
    if x.device.type == 'cpu':
        working = torch.promote_types(dtype, torch.float32)
        x, weight, bias = x.to(working), weight.to(working), None if bias is None else bias.to(working)
    if x.ndim == 3 and 8 * before[0] < x.shape[2]:  # leaner and 10 % faster than a padded copy that backward needs
        return F.conv1d(x, weight, bias, padding=before, groups=groups)[..., :x.shape[2]].contiguous().to(dtype)
    if layout is None or _private.transforms_active():
        return _direct(x, weight, bias, before, groups).to(dtype)
    y = _direct(x.contiguous(memory_format=layout), weight, bias, before, groups)
    return y.to(dtype).contiguous(memory_format=memory_format(x))


def _compute_by_fft(x: torch.Tensor, call: _Call) -> torch.Tensor:
    weight, bias, before, groups, kept = call
    recorded = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    compiling = torch.compiler.is_compiling()
    if not compiling and (recorded or _private.transforms_active() or _private.forward_ad_active()):
        y = Conv.apply(x, weight, before, groups, False)
    elif compiling or _private.dispatch_mode_active() or type(x) is not torch.Tensor:
        y = torch.ops.timm_smpconv.fft_conv(x, weight, before, groups, False)
    else:  # without the operator, which takes 0.15 ms
        size = tuple(x.shape[2:])
        kernel = None if kept is None else kept.derived(
            weight, (size, tuple(before)), spectra.transform, size, before)
        y = spectra.conv(x, weight, before, groups, kernel)
    return y if bias is None else y + bias.view(-1, *[1] * len(before))


def _cropped(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        groups: int,
        kept: Optional[Kept],
) -> _Call:
    """The call without the taps that meet nothing but padding."""
    before = _before(weight)
    for d, (n, k, p) in enumerate(zip(x.shape[2:], weight.shape[2:], before)):
        first, end = max(0, p - n + 1), min(k, p + n)
        if end - first < k:
            weight, before[d] = weight.narrow(d + 2, first, end - first), p - first
    return _Call(weight, bias, before, groups, kept)


def _in_autocast(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]):
    """The arguments as autocast makes them."""
    if x.device.type == 'meta' or not torch.is_autocast_enabled(x.device.type):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return autocast(x, dtype), autocast(weight, dtype), None if bias is None else autocast(bias, dtype)


def _fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a direct convolution takes less than 2 GiB for the windows of one image or sequence."""
    return weight[0].numel() * x[0, 0].numel() * max(4, x.element_size()) < 2 ** 31


def _before(weight: torch.Tensor) -> List[int]:
    """The zeros in front of the input, for each dimension."""
    return [weight.shape[2] - 1] if weight.ndim == 3 else [k // 2 for k in weight.shape[2:]]


def _direct(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        before: List[int],
        groups: int,
) -> torch.Tensor:
    """`F.conv1d` or `F.conv2d` of the size of x."""
    if weight.ndim == 3:
        return F.conv1d(F.pad(x, (before[0], 0)), weight, bias, groups=groups)
    return F.conv2d(x, weight, bias, padding=before, groups=groups)


def _unsupported(backend: str, x: torch.Tensor) -> Optional[str]:
    """Why a backend cannot run."""
    if backend == 'triton':
        return 'there is no Triton program for convolutions over channels'
    if x.ndim == 3 and backend in ('contiguous', 'channels_last'):
        return 'sequences have one memory format'
    return fft.unsupported(x) if backend == 'fft' else None


def _check(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        groups: int,
        causal: bool,
) -> None:
    size, kernel_size = ('L', 'K') if causal else ('H, W', 'KH, KW')
    if x.ndim != (3 if causal else 4):
        raise ValueError(f'x must be (B, I, {size}), got shape {tuple(x.shape)}')
    if 0 in x.shape[2:]:
        raise ValueError(f'x must have {size} of at least 1, got shape {tuple(x.shape)}')
    inputs = x.shape[1]
    if groups < 1 or inputs % groups:
        raise ValueError(f'groups must divide the {inputs} channels of x, got {groups}')
    if weight.ndim != x.ndim or weight.shape[1] != inputs // groups or 0 in weight.shape:
        name = 'I / groups' if causal else 'I'
        raise ValueError(
            f'weight must be (O, {name}, {kernel_size}) with {name} = {inputs // groups} as in x, got shape '
            f'{tuple(weight.shape)}')
    if weight.shape[0] % groups:
        raise ValueError(f'groups must divide the {weight.shape[0]} channels of the output, got {groups}')
    if not causal and any(k % 2 == 0 for k in weight.shape[2:]):
        raise ValueError(f'weight must have odd KH and KW, got shape {tuple(weight.shape)}')
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f'bias must be (O,) = ({weight.shape[0]},), got shape {tuple(bias.shape)}')
    check_types(x, weight, bias)
