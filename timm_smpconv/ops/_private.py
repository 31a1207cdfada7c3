"""Private names of PyTorch that the operators use, and what happens without them; names that differ by version.

Every function looks its name up when it is called. If the name is gone, the function returns a safe default: the
operators then use PyTorch's standard ones, which may be slower.
"""
import importlib
import logging
from typing import Any, FrozenSet, Optional, Sequence

import torch
from torch.autograd import forward_ad

# Arguments of PyTorch's fused convolution, an operator for its compiler. Another signature counts as absent.
_POINTWISE = 'X W B padding stride dilation groups attr scalars algorithm'
_LINEAR, _LINEAR_ADD = 'X W B attr scalars algorithm', 'X other W B attr'
_POINTWISE_ADD = 'X other W B padding stride dilation groups binary_attr alpha unary_attr unary_scalars unary_algorithm'


def _find(*path: str) -> Any:
    """The name below `torch`, None if it or a name on the way is gone."""
    found: Any = torch
    for name in path:
        found = getattr(found, name, None)
    return found


def transforms_active() -> bool:
    """Whether a `torch.func` transform (vmap, grad, jvp) is active; True if unknown."""
    active = _find('_C', '_are_functorch_transforms_active')
    return True if active is None else active()


def is_batched(x: torch.Tensor) -> bool:
    """Whether x is batched by `torch.autograd.grad(is_grads_batched=True)`; True if unknown."""
    legacy = _find('_C', '_functorch', 'is_legacy_batchedtensor')
    return True if legacy is None else legacy(x)


def dispatch_mode_active() -> bool:
    """Whether a `TorchDispatchMode` (a FLOP counter, say) is active; True if unknown."""
    length = _find('_C', '_len_torch_dispatch_stack')
    return True if length is None else length() > 0


def forward_ad_active() -> bool:
    """Whether forward-mode differentiation is active; True if unknown."""
    return getattr(forward_ad, '_current_level', 0) >= 0


def onednn_dtypes() -> FrozenSet[torch.dtype]:
    """The dtypes that PyTorch convolves by oneDNN on this CPU: float32 and the half precisions known to be supported.

    Empty in a PyTorch without oneDNN.
    """
    if not torch.backends.mkldnn.is_available():
        return frozenset()
    half = {torch.bfloat16: '_is_mkldnn_bf16_supported', torch.float16: '_is_mkldnn_fp16_supported'}
    supported = [dtype for dtype, name in half.items() if (_find('ops', 'mkldnn', name) or bool)()]
    return frozenset([torch.float32, *supported])


def pointwise_convolution() -> Optional[Any]:
    """oneDNN's convolution with an activation (overload `default`) or an addition (`binary`); None if unknown."""
    return _fused_operator('_convolution_pointwise', _POINTWISE, _POINTWISE_ADD)


def pointwise_linear() -> Optional[Any]:
    """The same of oneDNN's matrix product."""
    return _fused_operator('_linear_pointwise', _LINEAR, _LINEAR_ADD)


def _fused_operator(name: str, default: str, binary: str) -> Optional[Any]:
    operator = _find('ops', 'mkldnn', name)
    if operator is None or not {'default', 'binary'} <= set(operator.overloads()):
        return None
    signatures = [' '.join(a.name for a in o._schema.arguments) for o in (operator.default, operator.binary)]
    return operator if signatures == [default, binary] else None


def reordered_matrix(weight: torch.Tensor, rows: int) -> Optional[torch.Tensor]:
    """A copy of a weight (O, I, 1, 1) as a matrix in the format oneDNN prefers for products with (rows, I).

    None if that is unknown.
    """
    reorder = _find('ops', 'mkldnn', '_reorder_linear_weight')
    return None if reorder is None else reorder(weight.detach().flatten(1).contiguous(), rows)


def reordered_weight(
        weight: torch.Tensor,
        padding: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        input_size: Sequence[int],
) -> Optional[torch.Tensor]:
    """A copy of a convolution's weight in the format oneDNN prefers for inputs of `input_size`; None if unknown."""
    reorder = _find('_C', '_nn', 'mkldnn_reorder_conv2d_weight')
    if reorder is None:
        return None
    return reorder(weight.detach().contiguous().to_mkldnn(), padding, stride, dilation, groups, input_size)


def allows_tf32(operation: str) -> bool:
    """Whether PyTorch may compute float32 in TF32 on CUDA, in 'matmul' or in 'conv'.

    From torch 2.9 on by `fp32_precision`, as `allow_tf32` raises there once somebody has set the other.
    """
    old = torch.backends.cuda.matmul if operation == 'matmul' else torch.backends.cudnn
    new = old if operation == 'matmul' else getattr(old, 'conv', None)
    precision = getattr(new, 'fp32_precision', None)
    return bool(old.allow_tf32) if precision is None else precision == 'tf32'


def flop_formula(operator: Any) -> Any:
    """`torch.utils.flop_counter.register_flop_formula`, whose import warns where Triton is not installed."""
    logger = logging.getLogger('torch.utils.flop_counter')
    disabled, logger.disabled = logger.disabled, True
    try:
        flop_counter = importlib.import_module('torch.utils.flop_counter')
    finally:
        logger.disabled = disabled
    return flop_counter.register_flop_formula(operator)
