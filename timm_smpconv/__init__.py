"""SMPConv models for timm.

Importing this package registers them and their optimizers: `create_model("smpconv_tiny")`.
"""
from .checkpoint import CheckpointError as CheckpointError
from .kernel import SMPKernel as SMPKernel, render_kernel as render_kernel
from .layers import RepSMPConv2d as RepSMPConv2d, SMPConv1d as SMPConv1d, SMPConv2d as SMPConv2d
from .merged import MergeError as MergeError, prepack as prepack
from .ops import (
    causal_conv1d as causal_conv1d,
    depthwise_conv2d as depthwise_conv2d,
    large_conv2d as large_conv2d,
    use_backend as use_backend,
)
from .optim import (
    SMPAdam as SMPAdam,
    SMPAdamW as SMPAdamW,
    add_point_rules as add_point_rules,
    smp_param_groups as smp_param_groups,
)
from .plain import to_plain as to_plain
from .replace import ReplaceReport as ReplaceReport, replace_depthwise as replace_depthwise
from .resize import resize_kernels as resize_kernels
from .smp_resnet import SMPResNet as SMPResNet
from .smp_tcn import SMPTCN as SMPTCN
from .smpconv import SMPConvNet as SMPConvNet

__version__ = '0.1.0'
