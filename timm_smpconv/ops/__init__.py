"""The operators: torch only."""
from .backends import BACKENDS as BACKENDS
from .dense import (
    causal_conv1d as causal_conv1d,
    large_conv2d as large_conv2d,
    measure_dense as measure_dense,
)
from .depthwise import depthwise_conv2d as depthwise_conv2d
from .dispatch.kept import Kept as Kept
from .dispatch.request import requested_backend as requested_backend, use_backend as use_backend
from .fused import (
    ACTIVATIONS as ACTIVATIONS,
    conv2d_in_steps as conv2d_in_steps,
    fused_conv2d as fused_conv2d,
    measure_fused as measure_fused,
)
from .render import render_kernel as render_kernel
