"""Core ML, for Apple's devices: one image at a time."""
import sys
from pathlib import Path
from typing import Optional

import torch

from ..network import Network, Run, Source
from .engine import Engine, missing, no_other_than_float32, one_by_one

LINES = '''\
import coremltools

network = coremltools.models.MLModel("$file")
output = next(iter(network.predict({"$input_name": $input_name.numpy()}).values()))
'''


def unsupported(network: Network, precision: str) -> Optional[str]:
    if sys.platform != 'darwin':
        return 'it runs on macOS only'
    return missing('coremltools') or no_other_than_float32(precision)


def write(source: Source, precision: str, file: Path) -> None:
    import coremltools
    module, image = source.single()
    program = torch.export.export(module, (image,)).run_decompositions({})
    coremltools.convert(
        program, inputs=[coremltools.TensorType(source.network.input_name, image.shape)],
        compute_precision=coremltools.precision.FLOAT32, minimum_deployment_target=coremltools.target.iOS16).save(file)


def load(network: Network, file: Path, precision: str, batch: int) -> Run:
    import coremltools
    model = coremltools.models.MLModel(str(file))
    return one_by_one(lambda x: tuple(
        map(torch.from_numpy, model.predict({network.input_name: x.float().numpy()}).values())))


COREML = Engine('Core ML', '.mlpackage', unsupported, write, load, LINES)
