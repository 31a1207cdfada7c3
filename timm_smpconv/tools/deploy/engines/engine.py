"""What an engine is, and what several of them share."""
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Callable, Dict, NamedTuple, Optional

import torch

from ....ops.dispatch import cpu
from ..network import Network, Outputs, Run, Source

__all__ = ['Engine', 'missing', 'no_bfloat16', 'no_other_than_float32', 'one_by_one', 'properties']


class Engine(NamedTuple):
    """One way to run a network.

    Attributes:
        title: Its name, for people.
        suffix: Of its files.
        unsupported: The reason why it cannot run this network in this precision here, None if it can.
        write: Writes a file in this precision.
        load: The network, its file, the precision and the size of the batch → a function from inputs to outputs.
        python: Lines that compute `output` from an input: a `string.Template` of file, input_name and others.
        cpp: A C++ program.
        fixes_batch: Whether what `load` returns is for batches of that size alone.
        casts: Whether a float32 file is loaded in bfloat16.
        graph: Whether its files hold a graph, and so the normalisation.
        convolutions: Counts them in a file, if that is possible.
    """
    title: str
    suffix: str
    unsupported: Callable[[Network, str], Optional[str]]
    write: Callable[[Source, str, Path], object]
    load: Callable[[Network, Path, str, int], Run]
    python: str
    cpp: str = ''
    fixes_batch: bool = False
    casts: bool = False
    graph: bool = True
    convolutions: Optional[Callable[[Path], int]] = None

    def file(self, precision: str) -> str:
        own = precision != 'float32' and not (self.casts and precision == 'bfloat16')
        return f'model{f"_{precision}" if own else ""}{self.suffix}'


def missing(*packages: str) -> Optional[str]:
    """Why an engine of these packages cannot run."""
    lacking = [package for package in packages if find_spec(package) is None]
    return f'not installed: {", ".join(lacking)}' if lacking else None


def no_bfloat16(precision: str) -> Optional[str]:
    """Why a precision is not one of a CPU's floating point ones here."""
    if precision == 'bfloat16' and torch.bfloat16 not in cpu.HERE.onednn:
        return 'this CPU has no bfloat16'
    return None


def no_other_than_float32(precision: str) -> Optional[str]:
    """Why an engine is not offered in a precision."""
    return None if precision == 'float32' else f'{precision} is not offered here'


def one_by_one(run: Run) -> Run:
    """What takes one image, for a batch."""
    def batched(x: torch.Tensor) -> Outputs:
        return tuple(map(torch.cat, zip(*(run(image) for image in x.split(1)))))
    return batched


def properties(network: Network) -> Dict[str, str]:
    """What a file says of itself, as ONNX and OpenVINO keep it: texts, JSON where they are not texts."""
    found: Dict[str, Any] = network._asdict()
    found.update(found.pop('data'))
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in found.items()}
