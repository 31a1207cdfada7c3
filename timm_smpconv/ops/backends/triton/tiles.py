"""How much the Triton programs compute at a time, and what fits into a GPU. Imports no Triton.

P is the width of the map rounded up to a power of two, at least 16: the tensor cores take products of 16 terms. What
the compiler makes of each tile: `python -m benchmarks.triton_report`.
"""
from typing import NamedTuple, Tuple

import torch

from ... import _private

MOST_ROWS = 4  # of the kernel at a time: with 8, of 16 columns each, addresses spill
_HALF = (torch.bfloat16, torch.float16)


class ConvTile(NamedTuple):
    """Of a convolution: m × n outputs, from products of m × P inputs and n × P entries of slabs.

    Attributes:
        m: Images, or images times groups of rows where images are few.
        n: Rows times P columns.
        warps: At most so many, small maps and batches take fewer; see `warps`.
    """
    m: int
    n: int
    warps: int

    def numbers(self, p: int) -> int:
        """In shared memory, for one product."""
        return (self.m + max(self.n, p)) * p


class GradientTile(NamedTuple):
    """Of a weight gradient: m × P products of rows, from `step` rows of both tensors at a time.

    Attributes:
        m: Rows of the kernel, at most 4, times P.
        step: Rows of images.
        warps: As above.
    """
    m: int
    step: int
    warps: int

    def numbers(self, p: int) -> int:
        """In shared memory, for one product."""
        return (min(max(self.m, p), MOST_ROWS * p) + p) * self.step


# The first that fits is taken. In half precision the accumulator of 128 × 256 fills the registers of 8 warps.
_CONV_TILES = {
    True: (ConvTile(128, 256, 8), ConvTile(128, 128, 8), ConvTile(64, 128, 4), ConvTile(64, 64, 4)),
    False: (ConvTile(64, 128, 4), ConvTile(64, 64, 4), ConvTile(32, 64, 4), ConvTile(16, 16, 4))}
_GRADIENT_TILES = {
    True: (GradientTile(128, 64, 8), GradientTile(64, 64, 8), GradientTile(64, 32, 4)),
    False: (GradientTile(64, 64, 4), GradientTile(64, 32, 4), GradientTile(16, 16, 4))}


def columns(width: int) -> int:
    """P."""
    return max(16, 1 << (width - 1).bit_length())


def precision(x: torch.Tensor) -> str:
    """'half', 'tf32' where PyTorch allows that in matrix products of float32, else 'float32'."""
    if x.dtype in _HALF:
        return 'half'
    return 'tf32' if _private.allows_tf32('matmul') else 'float32'


def limits(x: torch.Tensor) -> Tuple[int, int]:
    """Compute capability, as 80 for 8.0, and the bytes of shared memory that a program can have, where x is."""
    if x.device.type != 'cuda':  # in the interpreter, or without memory
        return 90, 227 * 1024
    properties = torch.cuda.get_device_properties(x.device)
    shared = getattr(properties, 'shared_memory_per_block_optin', properties.shared_memory_per_block)  # not on AMD
    return 10 * properties.major + properties.minor, shared


def conv_tile(x: torch.Tensor) -> ConvTile:
    """The tile of `programs.conv` by default."""
    return _first(_CONV_TILES[x.dtype in _HALF], x)


def gradient_tile(x: torch.Tensor) -> GradientTile:
    """The tile of `programs.weight_gradient` by default."""
    return _first(_GRADIENT_TILES[x.dtype in _HALF], x)


def _first(tiles, x: torch.Tensor):
    # Addresses take registers too: more where rows are short, as they are read and written by the few columns.
    narrow = x.dtype in _HALF and columns(x.shape[3]) < 32
    return next((tile for tile in tiles[narrow:] if buffers(tile, x) > 1), tiles[-1])


def buffers(tile, x: torch.Tensor) -> int:
    """For how many products at a time, at most 3, there is shared memory: the next are read during one."""
    bytes_each = tile.numbers(columns(x.shape[3])) * x.element_size()
    return min(3 if x.dtype in _HALF else 2, limits(x)[1] // bytes_each)


def stages(tile, x: torch.Tensor) -> int:
    """What Triton calls it. Products that read shared memory keep a buffer busy; others take registers first."""
    reads_shared = limits(x)[0] // 10 in (9, 10) and precision(x) != 'float32'
    return max(1, buffers(tile, x)) + (not reads_shared)


def warps(tile, x: torch.Tensor) -> int:
    """Without tensor cores, in 'float32', operands take registers too."""
    return 8 if precision(x) == 'float32' else tile.warps
