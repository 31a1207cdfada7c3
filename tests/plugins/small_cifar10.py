"""For timm's train.py, by `--device-modules`: the images in `$SMALL_CIFAR10` pass for CIFAR-10, which has an MD5."""
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))

from data_folders import accept_cifar10

accept_cifar10(Path(os.environ['SMALL_CIFAR10']))
