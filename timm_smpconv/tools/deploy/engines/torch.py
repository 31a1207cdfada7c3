"""PyTorch: the merged network as it is, prepacked, or compiled. Its file holds the weights."""
import shutil
from pathlib import Path
from typing import Callable, Optional

import torch
import torch._dynamo.config
import torch._inductor.config
import torch.nn as nn
from safetensors.torch import load_file, save

from ....surgery.prepack import prepack
from ..network import Network, Run, Source, contiguous, runner
from .engine import Engine, no_bfloat16

LINES = '''\
from safetensors.torch import load_file
from timm.utils import reparameterize_model

network = reparameterize_model($create.eval())$cast
network.load_state_dict(load_file("$file"))
$input_name = $input_name$cast
'''
RUN = '''\
with torch.inference_mode():
    output = network($input_name)
'''
PREPACK = '''\
import timm_smpconv

network = timm_smpconv.prepack(network, $input_name)  # frozen, its convolutions timed for inputs of this size
'''
COMPILE = '''\
import torch._inductor.config

torch._inductor.config.freezing = True
network = torch.compile(network)
with torch.no_grad():
    output = network($input_name)
'''


def unsupported(network: Network, precision: str) -> Optional[str]:
    return 'int8 is for ONNX Runtime and OpenVINO' if precision == 'int8' else no_bfloat16(precision)


def unsupported_prepacked(network: Network, precision: str) -> Optional[str]:
    return unsupported(network, precision) or (None if network.packs else 'no convolution of this package')


def unsupported_compiled(network: Network, precision: str) -> Optional[str]:
    compilers = [name for name in torch._inductor.config.cpp.cxx if name]
    found = any(map(shutil.which, compilers))
    return unsupported(network, precision) or (None if found else f'no C++ compiler: {", ".join(compilers)}')


def write(source: Source, precision: str, file: Path) -> None:
    file.write_bytes(save(contiguous(source.merged)))  # not by `save_file`, whose files only their owner may read


def _network(network: Network, file: Path, precision: str) -> nn.Module:
    model = network.build()
    model.load_state_dict(load_file(file))
    model = model.to(getattr(torch, precision))
    return model.to(memory_format=torch.channels_last) if network.data else model


def _run(network: Network, model: Callable, precision: str) -> Run:
    layout, run = torch.channels_last if network.data else torch.contiguous_format, runner(model)
    return lambda x: tuple(t.float() for t in run(x.to(getattr(torch, precision), memory_format=layout)))


def load(network: Network, file: Path, precision: str, batch: int) -> Run:
    return _run(network, _network(network, file, precision), precision)


def load_prepacked(network: Network, file: Path, precision: str, batch: int) -> Run:
    model = _network(network, file, precision)
    x = torch.randn(batch, *network.input_size).to(getattr(torch, precision))
    if network.data:  # it times the convolutions of images
        x = x.contiguous(memory_format=torch.channels_last)
    return _run(network, prepack(model, x), precision)


def load_compiled(network: Network, file: Path, precision: str, batch: int) -> Run:
    run = _run(network, torch.compile(_network(network, file, precision), dynamic=False), precision)
    with torch._inductor.config.patch(freezing=True), torch._dynamo.config.patch(recompile_limit=256):
        run(torch.randn(batch, *network.input_size))
    return run


TORCH = Engine('PyTorch', '.safetensors', unsupported, write, load, LINES + RUN, casts=True, graph=False)
PREPACKED = TORCH._replace(
    title='PyTorch, prepacked', unsupported=unsupported_prepacked, load=load_prepacked, python=LINES + PREPACK + RUN,
    fixes_batch=True)
COMPILED = TORCH._replace(
    title='PyTorch, compiled', unsupported=unsupported_compiled, load=load_compiled, python=LINES + COMPILE,
    fixes_batch=True)
