"""AOTInductor: a library for CPUs of this kind, which Python and C++ load without this package."""
from pathlib import Path

import torch
import torch._inductor
import torch._inductor.config

from ..network import Network, Run, Source, runner
from .engine import Engine
from .torch import unsupported_compiled

LINES = '''\
network = torch._inductor.aoti_load_package("$file")
with torch.no_grad():
    output = network($input_name)
'''


def write(source: Source, precision: str, file: Path) -> None:
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        torch._inductor.aoti_compile_and_package(source.program(precision), package_path=str(file))


def load(network: Network, file: Path, precision: str, batch: int) -> Run:
    return runner(torch._inductor.aoti_load_package(str(file)))


AOTINDUCTOR = Engine('PyTorch, AOTInductor', '_aoti.pt2', unsupported_compiled, write, load, LINES)
