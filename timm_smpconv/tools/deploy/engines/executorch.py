"""ExecuTorch, with XNNPACK, for phones: one image at a time."""
from pathlib import Path
from typing import Optional

import torch

from ..network import Network, Run, Source
from .engine import Engine, missing, no_other_than_float32, one_by_one

LINES = '''\
from executorch.runtime import Runtime

network = Runtime.get().load_program("$file").load_method("forward")
output = network.execute([$input_name])[0]
'''


def unsupported(network: Network, precision: str) -> Optional[str]:
    return missing('executorch') or no_other_than_float32(precision)


def write(source: Source, precision: str, file: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    module, image = source.single()
    program = torch.export.export(module, (image,))
    file.write_bytes(to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch().buffer)


def load(network: Network, file: Path, precision: str, batch: int) -> Run:
    from executorch.runtime import Runtime
    method = Runtime.get().load_program(file).load_method('forward')
    return one_by_one(lambda x: tuple(t.clone() for t in method.execute([x.contiguous()])))


EXECUTORCH = Engine('ExecuTorch', '.pte', unsupported, write, load, LINES)
