"""The networks that `timm.create_model` builds: importing this registers them."""
from .smp_resnet import SMPResNet as SMPResNet
from .smp_tcn import SMPTCN as SMPTCN
from .smpconv import SMPConvNet as SMPConvNet
