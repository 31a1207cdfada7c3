"""torch.hub entry points: `torch.hub.load(REPO, "smpconv_tiny", pretrained=False, num_classes=10)`."""
from timm_smpconv.smpconv import (
    smpconv_base as smpconv_base,
    smpconv_mobile31 as smpconv_mobile31,
    smpconv_mobile51 as smpconv_mobile51,
    smpconv_tiny as smpconv_tiny,
)

dependencies = ['huggingface_hub', 'safetensors', 'timm', 'torch', 'torchvision']
