"""The operators: torch only."""
from .depthwise import BACKENDS as BACKENDS, depthwise_conv2d as depthwise_conv2d, use_backend as use_backend
from .fused import (
    ACTIVATIONS as ACTIVATIONS,
    PackedWeight as PackedWeight,
    conv2d_in_steps as conv2d_in_steps,
    fused_conv2d as fused_conv2d,
)
