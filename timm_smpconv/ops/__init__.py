"""The operators: torch only."""
from .depthwise import BACKENDS as BACKENDS, depthwise_conv2d as depthwise_conv2d, use_backend as use_backend
