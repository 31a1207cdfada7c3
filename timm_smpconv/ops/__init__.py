"""The operators: torch only."""
from .backends import BACKENDS as BACKENDS
from .choice import requested_backend as requested_backend, use_backend as use_backend
from .dense import PackedKernel as PackedKernel, causal_conv1d as causal_conv1d, large_conv2d as large_conv2d
from .depthwise import depthwise_conv2d as depthwise_conv2d
from .fused import (
    ACTIVATIONS as ACTIVATIONS,
    PackedWeight as PackedWeight,
    conv2d_in_steps as conv2d_in_steps,
    fused_conv2d as fused_conv2d,
    measure as measure,
)
from .render import render_kernel as render_kernel
