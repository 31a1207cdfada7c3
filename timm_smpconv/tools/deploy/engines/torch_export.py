"""`torch.export`: a graph of standard operators that PyTorch runs without this package."""
from pathlib import Path

import torch

from ..network import Network, Run, Source, count_convolutions, runner
from .engine import Engine
from .torch import unsupported

LINES = '''\
network = torch.export.load("$file").module()
with torch.no_grad():
    output = network($input_name)
'''


def write(source: Source, precision: str, file: Path) -> None:
    torch.export.save(source.program(precision), file)


def load(network: Network, file: Path, precision: str, batch: int) -> Run:
    return runner(torch.export.load(file).module())


def convolutions(file: Path) -> int:
    return count_convolutions(torch.export.load(file))


EXPORT = Engine('PyTorch, torch.export', '.pt2', unsupported, write, load, LINES, convolutions=convolutions)
