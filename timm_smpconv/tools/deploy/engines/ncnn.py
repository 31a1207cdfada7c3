"""ncnn, for phones, converted by pnnx: one image at a time."""
import shutil
from pathlib import Path
from typing import Optional

import torch

from ..network import Network, Run, Source
from .engine import Engine, missing, no_other_than_float32, one_by_one

LINES = '''\
import ncnn

network = ncnn.Net()
network.opt.use_fp16_packed = network.opt.use_fp16_storage = network.opt.use_fp16_arithmetic = False
network.load_param("$file")
network.load_model("$weights")
extractor = network.create_extractor()
extractor.input("in0", ncnn.Mat($input_name[0].numpy()))
output = torch.from_numpy(extractor.extract("out0")[1].numpy())[None]
'''


def unsupported(network: Network, precision: str) -> Optional[str]:
    if network.preprocess == 'in-graph' or network.task == 'features':
        return 'pixels in uint8 and several outputs are not offered here'
    return missing('ncnn', 'pnnx') or no_other_than_float32(precision)


def write(source: Source, precision: str, file: Path) -> None:
    import pnnx
    module, image = source.single()
    pnnx.export(module, str(source.folder / 'model.pt'), image, fp16=False)
    for suffix in 'param', 'bin':
        shutil.move(source.folder / f'model.ncnn.{suffix}', file.with_suffix(f'.{suffix}'))  # to another disk, perhaps


def load(network: Network, file: Path, precision: str, batch: int) -> Run:
    import ncnn
    net = ncnn.Net()
    net.opt.num_threads = torch.get_num_threads()
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.load_param(str(file))
    net.load_model(str(file.with_suffix('.bin')))

    def run(image: torch.Tensor):
        extractor = net.create_extractor()
        extractor.input('in0', ncnn.Mat(image[0].contiguous().numpy()))
        return (torch.from_numpy(extractor.extract('out0')[1].numpy().copy())[None],)
    return one_by_one(run)


NCNN = Engine('ncnn', '_ncnn.param', unsupported, write, load, LINES)
