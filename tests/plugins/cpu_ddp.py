"""For timm's train.py, by `--device-modules`: DistributedDataParallel on a CPU, its weights kept, BatchNorms that stay
as they are.

train.py always names a device to DistributedDataParallel, which refuses that on a CPU. Statistics of half a batch are
not those of the whole, and SyncBatchNorm runs on GPUs only, so every BatchNorm normalises with its running statistics
here. The weights at the end go to `$CPU_DDP_OUT/rank0.pt`, `rank1.pt`.
"""
import atexit
import os
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

_init = DistributedDataParallel.__init__


def _without_device(self, module, device_ids=None, **kwargs):
    _init(self, module, **kwargs)
    atexit.register(lambda: torch.save(
        module.state_dict(), Path(os.environ['CPU_DDP_OUT'], f'rank{os.environ["RANK"]}.pt')))


DistributedDataParallel.__init__ = _without_device
torch.nn.BatchNorm2d.train = lambda self, mode=True: torch.nn.Module.train(self, False)
