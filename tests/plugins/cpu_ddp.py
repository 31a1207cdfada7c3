"""For timm's train.py, by `--device-modules`: DistributedDataParallel on a CPU, and BatchNorms that stay as they are.

train.py always passes a device to DistributedDataParallel, which raises on a CPU. The statistics of half a batch differ
from those of the whole, and SyncBatchNorm needs a GPU, so every BatchNorm normalises with its running statistics here.
At the end each process writes its weights to `$RANK_FILES/rank0.pt`, `rank1.pt`.
"""
import atexit
import os
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

_init = DistributedDataParallel.__init__


def _without_device(self, module, device_ids=None, **kwargs):
    _init(self, module, **kwargs)
    path = Path(os.environ['RANK_FILES'], f'rank{os.environ["RANK"]}.pt')
    atexit.register(lambda: torch.save(module.state_dict(), path))


DistributedDataParallel.__init__ = _without_device
torch.nn.BatchNorm2d.train = lambda self, mode=True: torch.nn.Module.train(self, False)
