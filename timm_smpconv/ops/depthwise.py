"""Depthwise convolution with large kernels: stride 1, "same" zero padding, odd kernels. The function and its checks.

Shapes: B batch, C channels, H and W height and width, K and L height and width of the kernel.
"""
from typing import Optional

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function

from . import private, race
from .backends import BACKENDS, native
from .choice import check_backend, choose, requested_backend
from .derivatives import Conv, conv

__all__ = ['depthwise_conv2d']


def depthwise_conv2d(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor] = None,
        backend: Optional[str] = None,
) -> torch.Tensor:
    """`F.conv2d(x, weight, bias, padding=(K // 2, L // 2), groups=C)`, fast for large kernels too.

    Differentiable any number of times in x, weight and bias. The result has the memory format of x. In graphs that
    leave PyTorch (`torch.export`, TorchScript, tracing) it is that `F.conv2d`.

    Args:
        x: (B, C, H, W).
        weight: (C, 1, K, L) with odd K and L.
        bias: (C,).
        backend: 'native', 'contiguous', 'channels_last', 'fft' or 'triton' for this call and its gradients. Defaults to
            the backend set by `use_backend`, otherwise to the one expected to be the fastest on CPUs, see `ops.costs`;
            on CUDA with `torch.backends.cudnn.benchmark` to the one found to be the fastest, see `ops.race`; else to
            'native'. The errors of 'fft' are relative to the largest value of each plane (H, W); on CPUs it is never
            selected where that matters. Exact zeros in a weight gradient are exact in all backends; those in the output
            and in the input gradient are rounding noise with 'fft'.

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
    if backend is None:
        backend = requested_backend()
    else:
        check_backend('backend', backend)
    rounds_weight, device_type = False, x.device.type
    if device_type != 'meta' and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
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
    compiling = torch.compiler.is_compiling()
    raced = backend is None and (race.is_wanted(x) if compiling else race.is_allowed(x))
    if backend == 'native' or (backend is None and device_type != 'cpu' and not raced):
        return native.conv(x, weight, bias)
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    if not compiling and (recorded or private.transforms_active()):
        return Conv.apply(x, weight, bias, backend)
    if recorded or raced:
        return torch.ops.timm_smpconv.depthwise_conv2d(x, weight, bias, backend)
    if compiling:
        return _compiled(x, weight, bias, backend)
    # Dispatch modes see standard operators, except where the choice depends on values, which may be fake.
    if (private.dispatch_mode_active() or type(x) is not torch.Tensor) and (
            backend or choose('output', x, weight.shape[2], weight.shape[3])) in ('fft', 'triton'):
        return torch.ops.timm_smpconv.depthwise_conv2d(x, weight, bias, backend)
    return conv(x, weight, bias, backend)  # without the operator, which takes 0.15 ms


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
    if not is_dynamic and (backend or choose('output', x, weight.shape[2], weight.shape[3])) == 'native':
        return native.conv(x, weight, bias)
    return torch.ops.timm_smpconv.depthwise_conv2d(x, weight, bias, backend)


def is_exporting() -> bool:
    """Whether a graph is captured to leave PyTorch, in which the operator has to be a standard convolution."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def check_exportable(backend: Optional[str]) -> None:
    """Raise if a backend is requested that a graph to be exported cannot hold."""
    if backend not in (None, 'native'):
        raise ValueError(f'backend {backend!r} was requested and cannot run: an exported graph holds F.conv2d')


def autocast(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What autocast makes of an argument."""
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t


def _check(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor], rounds_weight: bool) -> None:
    if x.ndim != 4:
        raise ValueError(f'x must be (B, C, H, W), got shape {tuple(x.shape)}')
    if weight.ndim != 4 or weight.shape[0] != x.shape[1] or weight.shape[1] != 1:
        raise ValueError(f'weight must be (C, 1, K, L) with C = {x.shape[1]} as in x, got shape {tuple(weight.shape)}')
    if weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
        raise ValueError(f'weight must have odd K and L, got shape {tuple(weight.shape)}')
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f'bias must be (C,) = ({weight.shape[0]},), got shape {tuple(bias.shape)}')
    check_types(x, weight, bias, rounds_weight)


def check_types(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        rounds_weight: bool = False,
) -> None:
    """Raise if the dtypes or devices do not go together."""
    if not x.is_floating_point():
        raise TypeError(f'x must be floating point, got {x.dtype}')
    for name, t in (('weight', weight), ('bias', bias)):
        if t is not None and t.dtype != x.dtype and not (rounds_weight and t.dtype == torch.float32):
            raise TypeError(f'{name} must have the dtype of x, {x.dtype}, got {t.dtype}')
        if t is not None and t.device != x.device:
            raise ValueError(f'{name} must be on the device of x, {x.device}, got {t.device}')
