"""SMPConv models for timm.

Importing this package registers them and their optimizers: `create_model("smpconv_tiny")`.
"""
from .layers import (
    MergeError as MergeError,
    RepSMPConv2d as RepSMPConv2d,
    SMPConv1d as SMPConv1d,
    SMPConv2d as SMPConv2d,
    SMPKernel as SMPKernel,
)
from .models import SMPTCN as SMPTCN, SMPConvNet as SMPConvNet, SMPResNet as SMPResNet
from .ops import (
    causal_conv1d as causal_conv1d,
    depthwise_conv2d as depthwise_conv2d,
    large_conv2d as large_conv2d,
    render_kernel as render_kernel,
    use_backend as use_backend,
)
from .optim import (
    SMPAdam as SMPAdam,
    SMPAdamW as SMPAdamW,
    add_point_rules as add_point_rules,
    smp_param_groups as smp_param_groups,
)
from .surgery import (
    ReplaceReport as ReplaceReport,
    prepack as prepack,
    replace_depthwise as replace_depthwise,
    resize_kernels as resize_kernels,
    to_plain as to_plain,
)
from .weights.checkpoint import CheckpointError as CheckpointError

__version__ = '0.1.0'
