"""The modules, each with its `fuse`."""
from ._folding import MergeError as MergeError
from .heads import (
    ClassifierHead as ClassifierHead,
    NormClassifierHead as NormClassifierHead,
    SelectSequencePool as SelectSequencePool,
)
from .merged import (
    MergedBlock as MergedBlock,
    MergedConv1d as MergedConv1d,
    MergedConv2d as MergedConv2d,
    MergedLargeConv2d as MergedLargeConv2d,
    MergedNorm as MergedNorm,
)
from .rep_conv import (
    ConvNorm as ConvNorm,
    DenseRepSMPConv2d as DenseRepSMPConv2d,
    RepConv as RepConv,
    RepSMPConv1d as RepSMPConv1d,
    RepSMPConv2d as RepSMPConv2d,
)
from .small_conv import CausalConv1d as CausalConv1d, DepthwiseConv2d as DepthwiseConv2d
from .smp_conv import SMPConv1d as SMPConv1d, SMPConv2d as SMPConv2d
from .smp_kernel import SMPKernel as SMPKernel
