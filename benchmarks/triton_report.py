"""What the compiler makes of the Triton programs: `python -m benchmarks.triton_report`. Needs no GPU.

The launchers of `backends/triton/programs.py` run on tensors without memory, and every program they would launch is
compiled for the given compute capability, specialised as that launch would be. Registers, spills and the stack frame
are what Triton's `ptxas` says of the PTX; matrix instructions are counted in the PTX. A configuration that does not fit
into shared memory would fail at its launch.
"""
import argparse
import collections
import functools
import platform
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Dict, List, NamedTuple, Tuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.gpu import DTYPES, SHAPES
from timm_smpconv.ops import BACKENDS
from timm_smpconv.ops.backends.triton import tiles

SHARED = {80: 163, 89: 99, 90: 227, 100: 227}  # KiB of one block, by compute capability
PRODUCT = re.compile(
    r'(mma\.sync|wgmma)(?:\.mma_async\.sync)?\.aligned\.(m\d+n\d+k\d+)|(tcgen05)\.mma\.cta_group::1\.kind::(\w+)')
SHORT = {  # names of constants in the table
    'IMAGES': 'images', 'GROUPS': 'groups', 'R': 'R', 'T': 'T', 'P': 'P', 'ROWS': 'rows', 'num_warps': 'warps',
    'num_stages': 'stages'}
BATCH = 128
USED = re.compile(r'(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers',
                  re.DOTALL)


class Driver:
    """What Triton asks of a driver before a launch, for a GPU that is not there."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget('cuda', self.capability, 32)


class Launch(NamedTuple):
    """A program as it is launched, and what it takes: bytes of a block's shared memory, the rest by thread."""
    program: str
    constants: str
    registers: int
    stack: int
    stores: int
    loads: int
    shared: int
    products: str


def compiled(capability: int, launch, *args) -> List[Launch]:
    """What is launched by a call."""
    found, run = [], JITFunction.run

    def record(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        constants = ' '.join(f'{SHORT.get(name, name)} {value}' for name, value in kwargs.items() if name in SHORT)
        found.append(Launch(
            self.__name__.strip('_').removesuffix('_program'), constants, *usage(kernel.asm['ptx'], capability),
            kernel.metadata.shared, matrix_instructions(kernel.asm['ptx'])))
        return kernel

    driver.set_active(Driver(capability))
    with mock.patch.object(JITFunction, 'run', record):
        launch(*args)
    return found


@functools.cache
def usage(ptx: str, capability: int) -> Tuple[int, int, int, int]:
    """Registers, and bytes of the stack frame, spilled and read back."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'program.ptx')
        path.write_text(ptx)
        log = subprocess.run(  # as Triton calls it
            [get_ptxas(capability).path, '-v', '--regAllocOptLevel=2', '-lineinfo',
             f'--gpu-name={sm_arch_from_capability(capability)}', path, '-o', path.with_suffix('.o')],
            check=True, capture_output=True, text=True).stderr
    stack, stores, loads, registers = map(int, USED.search(log).groups())
    return registers, stack, stores, loads


def matrix_instructions(ptx: str) -> str:
    """Kinds and shapes, with how often they stand in the PTX. In tcgen05 the shape is in a descriptor: see the tile."""
    found = collections.Counter(' '.join(filter(None, match.groups())) for match in PRODUCT.finditer(ptx))
    return ', '.join(f'{kind} × {count}' for kind, count in sorted(found.items()))


def launched(capability: int, name: str, dtype: str) -> List[Launch]:
    """What the convolution and its weight gradient launch for one of the shapes, at batch 128."""
    c, h, k = SHAPES[name]
    dtype, tf32 = DTYPES[dtype]
    x = torch.empty(BATCH, c, h, h, dtype=dtype, device='meta')
    weight, bias = x.new_empty(c, 1, k, k), x.new_empty(c)
    limits = capability, SHARED[capability] * 1024
    torch.backends.cuda.matmul.allow_tf32 = tf32
    with mock.patch.object(tiles, 'limits', return_value=limits):
        backend = BACKENDS['triton']
        if backend.unsupported(x):
            return []
        return compiled(capability, backend.conv, x, weight, bias) + compiled(
            capability, backend.weight_gradient, x, x, k, k)


def faults(launch: Launch, capability: int) -> List[str]:
    found = ['spills'] if launch.stores or launch.loads else []
    return found + (['does not fit'] if launch.shared > SHARED[capability] * 1024 else [])


def show(capability: int, names: List[str], dtypes: List[str]) -> int:
    """Prints a table, equal lines as one. Returns the number of programs at fault."""
    lines: Dict[tuple, Dict[str, List[str]]] = {}
    wrong = 0
    for dtype in dtypes:
        for name in names:
            for launch in launched(capability, name, dtype):
                wrong += bool(faults(launch, capability))
                cells = (
                    launch.program, launch.constants, launch.registers, f'{launch.stores} / {launch.loads}',
                    launch.stack, f'{launch.shared / 1024:.1f}', launch.products, ', '.join(faults(launch, capability)))
                where = lines.setdefault(cells, {}).setdefault(dtype, [])
                if name not in where:
                    where.append(name)
    if lines:
        print('| program | for | tile | registers | spills, B | stack, B | shared, KiB | matrix instructions | |')
        print('|---|---|---|---|---|---|---|---|---|')
    for (program, *cells), where in sorted(lines.items(), key=lambda line: line[0][0]):
        by_names: Dict[str, List[str]] = {}
        for dtype, found in where.items():
            by_names.setdefault(' '.join(found), []).append(dtype)
        what = '; '.join(f'{", ".join(found)}: {shapes}' for shapes, found in by_names.items())
        print(f'| {program} | {what} | ' + ' | '.join(map(str, cells)) + ' |', flush=True)
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--capability', type=int, nargs='+', default=list(SHARED), choices=list(SHARED))
    parser.add_argument('--dtype', nargs='+', default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument('--shape', nargs='+', default=list('ABCDE'), choices=list(SHAPES))
    args = parser.parse_args()
    print(f'triton {triton.__version__}, torch {torch.__version__}, Python {platform.python_version()}, batch {BATCH}')
    wrong = 0
    for capability in args.capability:
        print(f'\nCompute capability {capability / 10}, {SHARED[capability]} KiB\n')
        wrong += show(capability, args.shape, args.dtype)
    print(f'\n{wrong} programs spill or do not fit')
    if wrong:
        raise SystemExit(1)


if __name__ == '__main__':
    main()
