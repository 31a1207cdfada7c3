"""Convolutions over channels with kernels as large as the input: causal in one dimension, "same" in two.

Shapes: B batch, I and O channels in and out, L length (1-D), H and W height and width, K (and L in 2-D) kernel size.
"""
import math
import time
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function

from . import private, spectra
from .backends import fft
from .choice import check_backend, memory_format, prefers_transform, requested_backend
from .dense_derivatives import Conv
from .depthwise import autocast, check_exportable, check_types, is_exporting

__all__ = ['PackedKernel', 'causal_conv1d', 'large_conv2d']


class PackedKernel:
    """The transform of a kernel, for the last size of input; copied and pickled without it.

    It takes 2 to 8 times the memory of the kernel.
    """

    def __init__(self):
        self._kept = None
        self._fastest: Dict[Any, str] = {}
        self.is_measuring = False  # at the next call

    def __getstate__(self) -> Dict[str, Any]:
        return {'_kept': None, '_fastest': {}, 'is_measuring': False}

    def fastest(self, x: torch.Tensor) -> Optional[str]:
        """The backend that was the fastest for such an input, None if it was not measured."""
        return self._fastest.get(_kind(x))

    def measure(self, run: Callable[[], torch.Tensor], x: torch.Tensor) -> None:
        """Time `run`, which convolves x, by FFT and directly; the faster one computes such inputs from now on."""
        self.is_measuring = False
        times: Dict[str, float] = {}
        for turn in range(4):  # the first is a warm-up
            for backend in ('fft', 'native'):
                if turn > 1 and times[backend] > 3 * min(times.values()):
                    continue
                self._fastest[_kind(x)] = backend
                start = time.perf_counter()
                run()
                if turn:
                    times[backend] = min(times.get(backend, math.inf), time.perf_counter() - start)
        self._fastest[_kind(x)] = min(times, key=times.__getitem__)

    def of(self, weight: torch.Tensor, size: Sequence[int], before: Sequence[int]) -> Optional[spectra.Kernel]:
        """The transform, made again if the weight or the size of the input changed; None if it cannot be kept."""
        if not _is_keepable(weight):
            return None
        made_for = (
            weight.data_ptr(), weight._version, weight.shape, weight.stride(), weight.dtype, tuple(size), tuple(before))
        kept = self._kept  # read once: threads may share it
        if kept is None or kept[0] != made_for:
            # Holding the weight, too, keeps its address from being reused.
            kept = self._kept = made_for, spectra.transform(weight, size, before), weight.detach()
        return kept[1]


def _kind(x: torch.Tensor) -> Any:
    """What the fastest backend depends on."""
    return x.shape, x.dtype, torch.get_num_threads()


def causal_conv1d(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor] = None,
        groups: int = 1,
        backend: Optional[str] = None,
        packed: Optional[Any] = None,
) -> torch.Tensor:
    """`F.conv1d(F.pad(x, (K - 1, 0)), weight, bias, groups=groups)`, fast for kernels as long as the sequence.

    Differentiable any number of times in x, weight and bias. It is computed directly or by FFT, whichever costs less by
    a count of operations. The errors of an FFT are relative to the largest value of the sequence, earlier samples
    included: on CPUs, sequences where that matters are computed directly, unless that takes 2 GiB and more for each. In
    graphs that leave PyTorch (`torch.export`, TorchScript, tracing) it is that `F.conv1d`.

    Args:
        x: (B, I, L).
        weight: (O, I / groups, K), any K: taps older than the sequence meet nothing but padding.
        bias: (O,).
        groups: Of `F.conv1d`.
        backend: 'native' or 'fft' for this call and its gradients.
        packed: A `PackedKernel`, which keeps the kernel's transform from one call to the next, where nothing is
            recorded or compiled and the weight does not require gradients.

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
        return handle_torch_function(causal_conv1d, inputs, x, weight, bias, groups, backend, packed)
    return _convolve(x, weight, bias, groups, backend, packed, causal=True)


def large_conv2d(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor] = None,
        backend: Optional[str] = None,
        packed: Optional[Any] = None,
) -> torch.Tensor:
    """`F.conv2d(x, weight, bias, padding=(K // 2, L // 2))`, fast for kernels as large as the map.

    Differentiable any number of times in x, weight and bias. It is computed directly or by FFT, whichever costs less by
    a count of operations. The errors of an FFT are relative to the largest value of the image: on CPUs, images where
    that matters are computed directly. In graphs that leave PyTorch (`torch.export`, TorchScript, tracing) it is that
    `F.conv2d`. The result of an FFT has the memory format of x.

    Args:
        x: (B, I, H, W).
        weight: (O, I, K, L) with odd K and L.
        bias: (O,).
        backend: 'native', 'contiguous', 'channels_last' or 'fft' for this call and its gradients.
        packed: A `PackedKernel`, which keeps the kernel's transform from one call to the next, where nothing is
            recorded or compiled and the weight does not require gradients.

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
        return handle_torch_function(large_conv2d, inputs, x, weight, bias, backend, packed)
    return _convolve(x, weight, bias, 1, backend, packed, causal=False)


def _convolve(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        groups: int,
        backend: Optional[str],
        packed: Optional[PackedKernel],
        causal: bool,
) -> torch.Tensor:
    """Causal in one dimension, or "same" in two."""
    if backend is None:
        backend = requested_backend()
    else:
        check_backend('backend', backend)
    if x.device.type != 'meta' and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = autocast(x, dtype), autocast(weight, dtype), None if bias is None else autocast(bias, dtype)
    if not torch.jit.is_tracing():
        _check(x, weight, bias, groups, causal)
    if is_exporting():
        check_exportable(backend)
        return _direct(x, weight, bias, _before(weight, causal), groups)
    if backend is not None:
        reason = _unsupported(backend, x, causal)
        if reason is not None:
            raise ValueError(f'backend {backend!r} was requested and cannot run: {reason}')
    before = _before(weight, causal)
    for d, (n, k, p) in enumerate(zip(x.shape[2:], weight.shape[2:], before)):
        first, end = max(0, p - n + 1), min(k, p + n)  # the other taps meet nothing but padding
        if end - first < k:
            weight, before[d] = weight.narrow(d + 2, first, end - first), p - first
    recorded = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    compiling = torch.compiler.is_compiling()
    keeps = packed is not None and groups == 1 and not recorded and not compiling and _is_keepable(weight)
    if backend is None:
        fastest = None
        if packed is not None and keeps:
            if packed.is_measuring and x.device.type == 'cpu' and _fits(x, weight):
                packed.measure(lambda: _convolve(x, weight, bias, groups, None, packed, causal), x)
            fastest = packed.fastest(x)
        transforms = fft.unsupported(x) is None and (
            prefers_transform(x, weight, before, groups, keeps) if fastest is None else fastest == 'fft')
        backend = 'fft' if transforms else 'native'
        values_known = x.device.type == 'cpu' and type(x) is torch.Tensor and not (
            compiling or private.transforms_active() or private.dispatch_mode_active())
        if transforms and values_known and x.numel() and _fits(x, weight):
            accurate = spectra.is_accurate(x)  # (B,)
            if not accurate.all():
                which = accurate.nonzero().flatten(), (~accurate).nonzero().flatten()
                parts = [
                    _convolve(x[part], weight, bias, groups, name, packed, causal)
                    for name, part in zip(('fft', 'native'), which) if len(part)]
                return torch.cat(parts)[torch.cat(which).argsort()]
    if x.shape[0] == 0:
        backend = 'native'
    if backend != 'fft':
        dtype, layout = x.dtype, {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
        if x.device.type == 'cpu':
            working = torch.promote_types(dtype, torch.float32)
            x, weight, bias = x.to(working), weight.to(working), None if bias is None else bias.to(working)
        if causal and 8 * before[0] < x.shape[2]:  # leaner and 10 % faster than with a padded copy that backward needs
            return F.conv1d(x, weight, bias, padding=before, groups=groups)[..., :x.shape[2]].contiguous().to(dtype)
        if backend == 'native' or private.transforms_active():
            return _direct(x, weight, bias, before, groups).to(dtype)
        y = _direct(x.contiguous(memory_format=layout[backend]), weight, bias, before, groups)
        return y.to(dtype).contiguous(memory_format=memory_format(x))
    if not compiling and (recorded or private.transforms_active() or private.forward_ad_active()):
        y = Conv.apply(x, weight, before, groups, False)
    elif compiling or private.dispatch_mode_active() or type(x) is not torch.Tensor:
        y = torch.ops.timm_smpconv.fft_conv(x, weight, before, groups, False)
    else:  # without the operator, which takes 0.15 ms
        kernel = packed.of(weight, x.shape[2:], before) if packed is not None and keeps else None
        y = spectra.conv(x, weight, before, groups, kernel)
    if bias is not None:
        y = y + bias.view(-1, *[1] * len(before))
    return y


def _fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a direct convolution takes less than 2 GiB for the windows of one image or sequence."""
    return weight[0].numel() * x[0, 0].numel() * max(4, x.element_size()) < 2 ** 31


def _before(weight: torch.Tensor, causal: bool) -> List[int]:
    """The zeros in front of the input, for each dimension."""
    return [k - 1 if causal else k // 2 for k in weight.shape[2:]]


def _direct(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        before: Sequence[int],
        groups: int,
) -> torch.Tensor:
    """`F.conv1d` or `F.conv2d` of the size of x."""
    if weight.ndim == 3:
        return F.conv1d(F.pad(x, (before[0], 0)), weight, bias, groups=groups)
    return F.conv2d(x, weight, bias, padding=before, groups=groups)


def _is_keepable(weight: torch.Tensor) -> bool:
    """Whether every change of the weight counts as a new version: not with fused optimizers, nor in inference mode."""
    return not weight.is_inference() and not weight.requires_grad


def _unsupported(backend: str, x: torch.Tensor, causal: bool) -> Optional[str]:
    """Why a backend cannot run."""
    if backend == 'triton':
        return 'there is no Triton program for convolutions over channels'
    if causal and backend in ('contiguous', 'channels_last'):
        return 'sequences have one memory format'
    return fft.unsupported(x) if backend == 'fft' else None


def _check(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        groups: int,
        causal: bool,
) -> None:
    size, kernel_size = ('L', 'K') if causal else ('H, W', 'K, L')
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
        raise ValueError(f'weight must have odd K and L, got shape {tuple(weight.shape)}')
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f'bias must be (O,) = ({weight.shape[0]},), got shape {tuple(bias.shape)}')
    check_types(x, weight, bias)
