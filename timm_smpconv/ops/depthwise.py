"""Depthwise convolution with large kernels: stride 1, "same" zero padding, odd kernels. The function and its checks.

Shapes: B batch, C channels, H and W height and width, KH and KW height and width of the kernel.
"""
from typing import Optional

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function

from . import _private
from .autograd.depthwise import convolve
from .backends import BACKENDS, native
from .dispatch import race, run
from .dispatch.choose import expected_fastest
from .dispatch.geometry import Geometry
from .dispatch.request import check_exportable, is_exporting, requested

__all__ = ['depthwise_conv2d']


def depthwise_conv2d(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor] = None,
        backend: Optional[str] = None,
) -> torch.Tensor:
    """`F.conv2d(x, weight, bias, padding=(KH // 2, KW // 2), groups=C)`, fast for large kernels too.

    Differentiable any number of times in x, weight and bias. The result has the memory format of x. In graphs that
    leave PyTorch (`torch.export`, TorchScript, tracing) it is that `F.conv2d`.

    Args:
        x: (B, C, H, W).
        weight: (C, 1, KH, KW) with odd KH and KW.
        bias: (C,).
        backend: 'native', 'contiguous', 'channels_last', 'fft' or 'triton' for this call and its gradients. Defaults to
            the backend set by `use_backend`, otherwise to the one expected to be the fastest on CPUs, see
            `dispatch.costs`; on CUDA with `torch.backends.cudnn.benchmark` to the one found to be the fastest, see
            `dispatch.race`; else to 'native'. The errors of 'fft' are relative to the largest value of each plane
            (H, W); on CPUs it is not selected for planes with a peak of more than 64 times the mean magnitude of their
            other nonzero values. Exact zeros in a weight gradient are exact in all
            backends; those in the output and in the input gradient are rounding noise with 'fft'.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: A shape or a device breaks the rules above, or the requested backend cannot run.
        TypeError: The dtypes differ (outside autocast) or are not floating point.

    Example:
        >>> x, weight = torch.randn(2, 8, 20, 30), torch.randn(8, 1, 31, 31)
        >>> y = depthwise_conv2d(x, weight)
        >>> torch.allclose(y, F.conv2d(x, weight, padding=15, groups=8), atol=1e-3)
        True
    """
    if torch.jit.is_scripting():
        padding = [weight.shape[2] // 2, weight.shape[3] // 2]
        return F.conv2d(x, weight, bias, padding=padding, groups=weight.shape[0])
    inputs = (x, weight) if bias is None else (x, weight, bias)
    if has_torch_function(inputs):
        return handle_torch_function(depthwise_conv2d, inputs, x, weight, bias, backend)
    backend = requested(backend)
    compiling = torch.compiler.is_compiling()
    # The type takes 5 µs. Before torch 2.9, compilers do not know `is_cpu`.
    rounds_weight, device = False, 'cpu' if not compiling and x.is_cpu else x.device.type
    if device != 'meta' and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        rounds_weight = backend is not None and BACKENDS[backend].rounds_weight
        x = autocast(x, dtype)
        if not rounds_weight:
            weight = autocast(weight, dtype)
            bias = None if bias is None else autocast(bias, dtype)
    if not torch.jit.is_tracing():
        _check(x, weight, bias, rounds_weight)
    if is_exporting():
        check_exportable(backend)
        return native.conv(x, weight, bias)
    raced = backend is None and race.is_on(x)
    if backend == 'native' or (backend is None and device != 'cpu' and not raced):
        return native.conv(x, weight, bias)
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    if compiling:
        return (_operator if recorded or raced else _compiled)(x, weight, bias, backend)
    if recorded or _private.transforms_active():
        return convolve(x, weight, bias, backend)
    # Dispatch modes see standard operators, except where the choice depends on values, which may be fake.
    if (_private.dispatch_mode_active() or type(x) is not torch.Tensor) and (
            raced or (backend or _chosen(x, weight)) in ('fft', 'triton')):
        return _operator(x, weight, bias, backend)
    return run.conv(x, weight, bias, backend)  # without the operator, which takes 0.15 ms


def _operator(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        backend: Optional[str],
) -> torch.Tensor:
    """The registered operator, which compilers and modes see as one call."""
    return torch.ops.timm_smpconv.depthwise_conv2d(x, weight, bias, backend)


@torch.compiler.allow_in_graph
def _compiled(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        backend: Optional[str],
) -> torch.Tensor:
    """What a compiler sees: a standard convolution if that is the choice, else the operator.

    For dynamic sizes the operator, too, which chooses when it runs. The graph never converts the memory format:
    inductor's code for that overwrites memory (torch 2.14, 4 × 96 × 56 × 56, 31×31).
    """
    is_dynamic = any(isinstance(n, torch.SymInt) for n in x.shape)
    if not is_dynamic and (backend or _chosen(x, weight)) == 'native':
        return native.conv(x, weight, bias)
    return _operator(x, weight, bias, backend)


def _chosen(x: torch.Tensor, weight: torch.Tensor) -> str:
    return expected_fastest(Geometry.of('output', x, weight.shape[2], weight.shape[3]))


def autocast(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What autocast makes of an argument."""
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t


def _check(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor], rounds_weight: bool) -> None:
    shape, size = x.shape, weight.shape
    if len(shape) != 4:
        raise ValueError(f'x must be (B, C, H, W), got shape {tuple(shape)}')
    if len(size) != 4 or size[0] != shape[1] or size[1] != 1:
        raise ValueError(f'weight must be (C, 1, KH, KW) with C = {shape[1]} as in x, got shape {tuple(size)}')
    if size[2] % 2 == 0 or size[3] % 2 == 0:
        raise ValueError(f'weight must have odd KH and KW, got shape {tuple(size)}')
    if bias is not None and bias.shape != size[:1]:
        raise ValueError(f'bias must be (C,) = ({size[0]},), got shape {tuple(bias.shape)}')
    check_types(x, weight, bias, rounds_weight)


def check_types(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        rounds_weight: bool = False,
) -> None:
    """Raise if the dtypes or devices do not go together."""
    dtype, device = x.dtype, x.device
    if not dtype.is_floating_point:
        raise TypeError(f'x must be floating point, got {dtype}')
    for name, t in (('weight', weight), ('bias', bias)):
        if t is None:
            continue
        if t.dtype != dtype and not (rounds_weight and t.dtype == torch.float32):
            raise TypeError(f'{name} must have the dtype of x, {dtype}, got {t.dtype}')
        if t.device != device:
            raise ValueError(f'{name} must be on the device of x, {device}, got {t.device}')
