"""A convolution with its activation and a residual in one pass of oneDNN: what merged models consist of.

`torch.compile` does the same with frozen weights, after half a minute and with a C++ compiler. This needs neither.

There are several ways to compute one, see `WAYS`. 1×1 convolutions are matrix products: all those of `smpconv_tiny`,
channels_last, batch 1, take 54 ms as oneDNN's convolutions and 46 as its matrix products, and 43 with kept copies of
the weights in a format of its own, which it otherwise makes before every product (2 cores, AVX-512, torch 2.14).

Shapes: B batch, C and O channels in and out, H and W height and width, K and L height and width of the kernel.
"""
import logging
import math
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.fx
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function

from . import choice, cpu, private
from .backends import fft
from .depthwise import check_exportable, depthwise_conv2d

__all__ = ['ACTIVATIONS', 'WAYS', 'PackedWeight', 'conv2d_in_steps', 'fused_conv2d', 'measure']

_logger = logging.getLogger(__name__)

ACTIVATIONS = ('none', 'relu', 'gelu')
# oneDNN's matrix product and its convolution, with the activation; otherwise step by step: `F.conv2d`, or a large
# depthwise convolution by one of its backends.
WAYS = ('matrix product', 'one pass', 'native', 'contiguous', 'channels_last', 'fft')

_convolve: Any = private.pointwise_convolution()
_multiply: Any = private.pointwise_linear()
_ROUNDS = 5  # of `measure`


class _Geometry(NamedTuple):
    """The arguments of `F.conv2d`."""
    stride: Tuple[int, int]
    padding: Tuple[int, int]
    dilation: Tuple[int, int]
    groups: int


class PackedWeight:
    """What is derived from a weight: a copy in oneDNN's own format or a transform, for the last size of input.

    And for inputs that were measured, the fastest way. Copied and pickled without any of it.
    """

    def __init__(self):
        self._kept = None
        self._fastest: Dict[Tuple, Tuple[str, float]] = {}

    def __getstate__(self) -> Dict[str, Any]:
        return {'_kept': None, '_fastest': {}}

    def fastest(self, x: torch.Tensor, residual: Optional[torch.Tensor]) -> Optional[str]:
        """The way that was the fastest for such an input, None if it was not measured."""
        return self._fastest.get(_kind(x, residual), (None, 0.))[0]

    def remember(self, x: torch.Tensor, residual: Optional[torch.Tensor], way: str, milliseconds: float) -> None:
        """Compute such inputs this way from now on."""
        self._fastest[_kind(x, residual)] = way, milliseconds

    @property
    def milliseconds(self) -> float:
        """What the fastest ways take, of all inputs that were measured."""
        return sum(time for _, time in self._fastest.values())

    def of(
            self,
            weight: torch.Tensor,
            x: torch.Tensor,
            way: str,
            derive: Callable[[], Optional[torch.Tensor]],
    ) -> Optional[torch.Tensor]:
        """What `derive` returns, called again if the weight or the size of x changed; None if it cannot be kept."""
        # Such weights can change without a new version: fused optimizers count none.
        if weight.is_inference() or weight.requires_grad:
            return None
        made_for = (way, weight.data_ptr(), weight._version, weight.shape, weight.stride(), weight.dtype, x.shape)
        kept = self._kept  # read once: threads may share it
        if kept is None or kept[0] != made_for:
            derived = derive()
            if derived is None:
                return None
            # Holding the weight, too, keeps its address from being reused.
            kept = self._kept = made_for, derived, weight.detach()
        return kept[1]


def _kind(x: torch.Tensor, residual: Optional[torch.Tensor]) -> Tuple:
    """What the fastest way depends on."""
    added = None if residual is None else (residual.shape, choice.memory_format(residual))
    return x.shape, x.dtype, choice.memory_format(x), added, torch.get_num_threads()


def fused_conv2d(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor] = None,
        stride: Tuple[int, int] = (1, 1),
        padding: Tuple[int, int] = (0, 0),
        dilation: Tuple[int, int] = (1, 1),
        groups: int = 1,
        activation: str = 'none',
        residual: Optional[torch.Tensor] = None,
        packed: Optional[PackedWeight] = None,
) -> torch.Tensor:
    """`activation(F.conv2d(x, weight, bias, stride, padding, dilation, groups)) + residual`.

    Computed in one pass on CPUs with AVX2 or AVX-512, in float32 and bfloat16, for channels_last inputs, where nothing
    is recorded, compiled or exported. Otherwise step by step.

    Args:
        x: (B, C, H, W).
        weight: (O, C / groups, K, L).
        bias: (O,).
        stride: Of `F.conv2d`, a pair.
        padding: Of `F.conv2d`, a pair.
        dilation: Of `F.conv2d`, a pair.
        groups: Of `F.conv2d`.
        activation: One of `ACTIVATIONS`; 'gelu' is the exact one, with the error function.
        residual: (B, O, H', W'), the shape of the result. It is not changed.
        packed: Keeps what is derived from the weight from one call to the next, if it does not require gradients.

    Returns:
        (B, O, H', W'). GELU in one pass turns infinity into NaN; everything else is the same in both ways.

    Example:
        >>> x, weight = torch.randn(1, 8, 14, 14), torch.randn(16, 8, 1, 1)
        >>> fused_conv2d(x, weight, activation='relu').shape
        torch.Size([1, 16, 14, 14])
    """
    inputs = [t for t in (x, weight, bias, residual) if t is not None]
    if has_torch_function(inputs):
        if any(isinstance(t, torch.fx.Proxy) for t in inputs):  # TorchScript may have to compile this graph
            return handle_torch_function(
                conv2d_in_steps, inputs, x, weight, bias, stride, padding, dilation, groups, activation, residual)
        return handle_torch_function(
            fused_conv2d, inputs, x, weight, bias, stride, padding, dilation, groups, activation, residual, packed)
    if torch.jit.is_tracing() and groups > 1:
        check_exportable(choice.requested_backend())
    geometry = _Geometry(stride, padding, dilation, groups)
    if not _is_free(inputs, x):
        return conv2d_in_steps(x, weight, bias, stride, padding, dilation, groups, activation, residual)
    way = None if packed is None else packed.fastest(x, residual)
    if way is None:
        way = _expected_fastest(x, weight, geometry, residual, packed)
    return _compute(way, x, weight, bias, geometry, activation, residual, packed)


def measure(
        packed: PackedWeight,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        stride: Tuple[int, int],
        padding: Tuple[int, int],
        dilation: Tuple[int, int],
        groups: int,
        activation: str,
        residual: Optional[torch.Tensor] = None,
) -> Dict[str, float]:
    """Time all ways to compute `fused_conv2d` for such an input, and let `packed` remember the fastest.

    Returns:
        Milliseconds of each way. A way that fails or differs from `F.conv2d` is left out. Nothing is measured, and the
        result empty, where the images make NaN or infinity, or where not the result alone counts.
    """
    if not _is_free([t for t in (x, weight, bias, residual) if t is not None], x):
        return {}
    geometry = _Geometry(stride, padding, dilation, groups)
    # In float32 at least: there are convolutions in bfloat16 that never return.
    wide = torch.promote_types(x.dtype, torch.float32)
    expected = conv2d_in_steps(
        x.to(wide), weight.to(wide), None if bias is None else bias.to(wide), stride, padding, dilation, groups,
        activation, None if residual is None else residual.to(wide), 'native')
    if not expected.isfinite().all():
        return {}
    limit = (1e-4 if x.element_size() > 2 else 5e-2) * expected.abs().amax()
    times: Dict[str, List[float]] = {}
    for way in _ways(x, weight, geometry, residual):
        try:
            y = _compute(way, x, weight, bias, geometry, activation, residual, None)
        except RuntimeError as error:
            _logger.warning('%s is left out for x %s: %s', way, tuple(x.shape), error)
            continue
        if (y - expected).abs().amax() <= limit:
            times[way] = []
        else:
            _logger.warning('%s is left out: it differs from F.conv2d for x %s', way, tuple(x.shape))
    for _ in range(_ROUNDS):
        best = min((min(found) for found in times.values() if found), default=math.inf)
        for way, found in times.items():
            if found and min(found) > 1.5 * best:
                continue
            keeper = PackedWeight()
            for _ in range(2):  # packs, and for the first time lets oneDNN compile
                _compute(way, x, weight, bias, geometry, activation, residual, keeper)
            start = time.perf_counter()
            _compute(way, x, weight, bias, geometry, activation, residual, keeper)
            found.append(1e3 * (time.perf_counter() - start))
    medians = {way: sorted(found)[len(found) // 2] for way, found in times.items() if found}
    if medians:
        fastest = min(medians, key=medians.__getitem__)
        packed.remember(x, residual, fastest, medians[fastest])
    return medians


def conv2d_in_steps(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        stride: Tuple[int, int],
        padding: Tuple[int, int],
        dilation: Tuple[int, int],
        groups: int,
        activation: str,
        residual: Optional[torch.Tensor],
        backend: Optional[str] = None,
) -> torch.Tensor:
    """`fused_conv2d` by standard operators and `depthwise_conv2d`, for TorchScript too."""
    if not torch.jit.is_tracing() and _is_same_depthwise(weight, stride, padding, dilation, groups):
        y = depthwise_conv2d(x, weight, bias, backend)
    else:
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if activation == 'relu':
        y = F.relu(y, inplace=True)
    elif activation == 'gelu':
        y = _gelu(y)
    return y if residual is None else residual + y


def _is_same_depthwise(
        weight: torch.Tensor,
        stride: Tuple[int, int],
        padding: Tuple[int, int],
        dilation: Tuple[int, int],
        groups: int,
) -> bool:
    """Whether `depthwise_conv2d` computes this convolution."""
    channels, inputs, k, l = weight.shape
    if groups != channels or inputs != 1 or k % 2 == 0 or l % 2 == 0:
        return False
    ones = stride[0] == 1 and stride[1] == 1 and dilation[0] == 1 and dilation[1] == 1
    return ones and padding[0] == k // 2 and padding[1] == l // 2


def _is_free(inputs: List[torch.Tensor], x: torch.Tensor) -> bool:
    """Whether nothing but the result counts: nothing is recorded, compiled, transformed, watched or requested.

    Invalid dtypes are not free: they fall through to the standard operators, which raise.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled('cpu'):
        return False
    if x.device.type != 'cpu' or x.ndim != 4 or x.numel() == 0 or not torch.backends.mkldnn.enabled:
        return False
    if private.transforms_active() or private.forward_ad_active() or private.dispatch_mode_active():
        return False
    if choice.requested_backend() is not None:
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return False
    if any(type(t) not in (torch.Tensor, torch.nn.Parameter) for t in inputs):
        return False
    return all(t.dtype == x.dtype and t.device == x.device for t in inputs)


def _fits_one_pass(
        x: torch.Tensor,
        weight: torch.Tensor,
        geometry: _Geometry,
        residual: Optional[torch.Tensor],
) -> bool:
    """Whether one pass is available and equivalent. Invalid shapes do not fit."""
    if _convolve is None or not cpu.HERE.fuses(x.dtype):
        return False
    if weight.ndim != 4 or x.shape[1] != weight.shape[1] * geometry.groups or min(geometry.stride) < 1:
        return False
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(x.shape[2:], geometry.padding, geometry.dilation, weight.shape[2:], geometry.stride)]
    if min(size) < 1 or choice.memory_format(x) != torch.channels_last:
        return False
    if residual is not None:
        if residual.shape != (x.shape[0], weight.shape[0], *size):
            return False
        if choice.memory_format(residual) != torch.channels_last:
            return False
    if not _is_same_depthwise(weight, *geometry):
        return True
    k, l = weight.shape[2:]
    _, dx = choice.margins(x, k, l)
    return choice.working_dtype(x, l - 2 * dx) == x.dtype


def _is_product(weight: torch.Tensor, geometry: _Geometry) -> bool:
    """Whether a convolution is a matrix product over channels."""
    return (
        _multiply is not None and geometry.groups == 1 and weight.shape[2:] == (1, 1)
        and geometry.stride == (1, 1) and geometry.padding == (0, 0))


def _ways(
        x: torch.Tensor,
        weight: torch.Tensor,
        geometry: _Geometry,
        residual: Optional[torch.Tensor],
) -> List[str]:
    """The ways that are available."""
    found = []
    if _fits_one_pass(x, weight, geometry, residual):
        found = ['matrix product', 'one pass'] if _is_product(weight, geometry) else ['one pass']
    found.append('native')
    if _is_same_depthwise(weight, *geometry):
        _, dx = choice.margins(x, weight.shape[2], weight.shape[3])
        other = 'contiguous' if choice.memory_format(x) == torch.channels_last else 'channels_last'
        if choice.working_dtype(x, weight.shape[3] - 2 * dx) != x.dtype:
            return ['fft']  # the others are slow, or never return
        found += [other, 'fft']
    return found


def _expected_fastest(
        x: torch.Tensor,
        weight: torch.Tensor,
        geometry: _Geometry,
        residual: Optional[torch.Tensor],
        packed: Optional[PackedWeight],
) -> Optional[str]:
    """The way to take without a measurement; None for standard operators."""
    fits = _fits_one_pass(x, weight, geometry, residual)
    if fits and not _is_same_depthwise(weight, *geometry):
        return 'matrix product' if _is_product(weight, geometry) else 'one pass'
    if weight.ndim == 4 and _is_same_depthwise(weight, *geometry) and x.shape[1] == weight.shape[0]:
        backend = choice.choose('output', x, weight.shape[2], weight.shape[3])
        if fits and backend in ('native', 'channels_last'):
            return 'one pass'
        if backend == 'fft' and packed is not None:
            return 'fft'
    return None


def _compute(
        way: Optional[str],
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        geometry: _Geometry,
        activation: str,
        residual: Optional[torch.Tensor],
        packed: Optional[PackedWeight],
) -> torch.Tensor:
    """`fused_conv2d` one way; None stands for standard operators."""
    if way not in ('matrix product', 'one pass', 'fft'):
        return conv2d_in_steps(x, weight, bias, *geometry, activation, residual, way)
    if _is_same_depthwise(weight, *geometry):
        dy, dx = choice.margins(x, weight.shape[2], weight.shape[3])
        weight = weight[:, :, dy:weight.shape[2] - dy, dx:weight.shape[3] - dx]
        geometry = geometry._replace(padding=(geometry.padding[0] - dy, geometry.padding[1] - dx))
    if way == 'fft':
        if not fft.is_accurate(x, weight):
            return conv2d_in_steps(x, weight, bias, *geometry, activation, residual)
        kernel = None if packed is None else packed.of(
            weight, x, way, lambda: fft.transform(weight, x.shape[2], x.shape[3]))
        return _finish(fft.conv(x, weight, bias, kernel), activation, residual)
    bias = None if bias is None else bias.contiguous()  # oneDNN ignores its strides
    fused = 'gelu' if activation == 'gelu' else 'none'
    added = residual if activation == 'none' else None
    if way == 'matrix product':
        y = _product(x, weight, bias, fused, added, packed)
    else:
        y = _convolution(x, weight, bias, geometry, fused, added, packed)
    return _finish(y, 'relu' if activation == 'relu' else 'none', None if added is residual else residual)


def _convolution(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        geometry: _Geometry,
        activation: str,
        added: Optional[torch.Tensor],
        packed: Optional[PackedWeight],
) -> torch.Tensor:
    """With a GELU or an addition."""
    stride, padding, dilation, groups = geometry
    if packed is not None:
        copy = packed.of(weight, x, 'one pass', lambda: private.reordered_weight(
            weight, padding, stride, dilation, groups, x.shape))
        weight = weight if copy is None else copy
    if added is not None:
        return _convolve.binary(
            x, added, weight, bias, padding, stride, dilation, groups, 'add', 1.0, None, [], None)
    return _convolve(x, weight, bias, padding, stride, dilation, groups, activation, [], 'none')


def _product(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        activation: str,
        added: Optional[torch.Tensor],
        packed: Optional[PackedWeight],
) -> torch.Tensor:
    """A 1×1 convolution of a channels_last x as a matrix product, with a GELU or an addition."""
    b, c, h, w = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(-1, c)  # (B H W, C), a view
    matrix = weight.reshape(-1, c)
    if packed is not None:
        copy = packed.of(
            weight, x, 'matrix product', lambda: private.reordered_matrix(matrix.detach(), rows.shape[0]))
        matrix = matrix if copy is None else copy
    if added is not None:
        y = _multiply.binary(rows, added.permute(0, 2, 3, 1).reshape(-1, weight.shape[0]), matrix, bias, 'add')
    else:
        y = _multiply(rows, matrix, bias, activation, [], 'none')
    return y.view(b, h, w, -1).permute(0, 3, 1, 2)


def _finish(y: torch.Tensor, activation: str, residual: Optional[torch.Tensor]) -> torch.Tensor:
    """The activation, in place, and the residual. oneDNN's ReLU would turn NaN into 0."""
    if activation == 'relu':
        y.relu_()
    elif activation == 'gelu':
        torch.ops.aten.gelu_(y)
    return y if residual is None else y.add_(residual)


def _gelu(y: torch.Tensor) -> torch.Tensor:
    """GELU that overwrites y where nothing is recorded: a new tensor of that size costs more than the function."""
    if torch.jit.is_scripting():
        return F.gelu(y)
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return F.gelu(y)
    return torch.ops.aten.gelu_(y)
