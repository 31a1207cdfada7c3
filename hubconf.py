"""torch.hub entry points: `torch.hub.load(REPO, "smpconv_tiny", pretrained=False, num_classes=10)`."""
from timm_smpconv.models.smp_resnet import smpconv_resnet_cifar10 as smpconv_resnet_cifar10
from timm_smpconv.models.smp_tcn import (
    smpconv_tcn_ct as smpconv_tcn_ct,
    smpconv_tcn_pmnist as smpconv_tcn_pmnist,
    smpconv_tcn_sc as smpconv_tcn_sc,
    smpconv_tcn_scifar10 as smpconv_tcn_scifar10,
    smpconv_tcn_scraw as smpconv_tcn_scraw,
    smpconv_tcn_smnist as smpconv_tcn_smnist,
)
from timm_smpconv.models.smpconv import (
    smpconv_base as smpconv_base,
    smpconv_mobile31 as smpconv_mobile31,
    smpconv_mobile51 as smpconv_mobile51,
    smpconv_tiny as smpconv_tiny,
)

dependencies = ['filelock', 'gdown', 'huggingface_hub', 'safetensors', 'timm', 'torch', 'torchvision', 'tqdm', 'yaml']
