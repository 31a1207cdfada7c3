"""For timm's train.py, by `--device-modules`: the same images in the same order in every epoch.

An update then sees the same images in two processes as in one with twice the batch, and in a resumed run as in an
uninterrupted one.
"""
import random

from torch.utils.data import RandomSampler
from torch.utils.data.distributed import DistributedSampler


def _order(count):
    order = list(range(count))
    random.Random(0).shuffle(order)
    return order


RandomSampler.__iter__ = lambda self: iter(_order(len(self.data_source)))
DistributedSampler.__iter__ = lambda self: iter(_order(len(self.dataset))[self.rank::self.num_replicas])
