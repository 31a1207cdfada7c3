"""The geometry of one pass of a depthwise convolution: all that the choice of a backend depends on, but for values.

Shapes: B batch, C channels, H and W height and width, KH and KW height and width of the kernel.
"""
from typing import NamedTuple, Tuple

import torch
import torch.nn.functional as F

from ..backends.native import memory_format
from . import cpu

__all__ = ['PASSES', 'Geometry', 'memory_format', 'working_dtype']

PASSES = ('output', 'input gradient', 'weight gradient')
FORMATS = {False: 'contiguous', True: 'channels_last'}
_HALF = (torch.bfloat16, torch.float16)


class Geometry(NamedTuple):
    """One pass.

    Attributes:
        what: One of `PASSES`.
        b: B, and so on.
        channels_last: The memory format of the input or, for its gradient, of the output's gradient; else contiguous.
        dtype: Of the same.
        device: Its type, 'cpu' for example.
    """
    what: str
    b: int
    c: int
    h: int
    w: int
    kh: int
    kw: int
    channels_last: bool = False
    dtype: torch.dtype = torch.float32
    device: str = 'cpu'

    @classmethod
    def of(cls, what: str, x: torch.Tensor, kh: int, kw: int) -> 'Geometry':
        """A pass over x (B, C, H, W), the input or, for its gradient, the gradient of the output."""
        b, c, h, w = map(int, x.shape)  # sizes that are symbols to a tracer become numbers
        device = 'cpu' if x.is_cpu else x.device.type  # the type alone takes 5 µs
        return cls(what, b, c, h, w, kh, kw, memory_format(x) is torch.channels_last, x.dtype, device)

    @property
    def margins(self) -> Tuple[int, int]:
        """Rows and columns on every side of the kernel that meet nothing but padding: cropping them is exact."""
        return max(0, self.kh // 2 - self.h + 1), max(0, self.kw // 2 - self.w + 1)

    def cropped(self) -> 'Geometry':
        """The pass as it is computed: without the margins, in `working_dtype`."""
        if self.kh // 2 < self.h and self.kw // 2 < self.w and self.dtype not in _HALF:
            return self
        dy, dx = self.margins
        kh, kw = self.kh - 2 * dy, self.kw - 2 * dx
        return self._replace(kh=kh, kw=kw, dtype=working_dtype(self.dtype, self.device, self.c, kw))

    def crop(self, weight: torch.Tensor) -> torch.Tensor:
        """weight (C, 1, KH, KW) without the margins."""
        if self.kh // 2 < self.h and self.kw // 2 < self.w:
            return weight
        dy, dx = self.margins
        return weight[:, :, dy:self.kh - dy, dx:self.kw - dx]

    def finish(self, y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """y in the dtype: a weight's gradient of full size and contiguous, else in the memory format of the pass."""
        if y.dtype != dtype:
            y = y.to(dtype)
        if self.what != 'weight gradient':
            return y.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)
        dy, dx = self.margins
        return (F.pad(y, (dx, dx, dy, dy)) if dy or dx else y).contiguous()

    @property
    def setting(self) -> str:
        """What the rows of a table have in common."""
        return f'batch {self.b}, {FORMATS[self.channels_last]}, {str(self.dtype)[6:]}, {self.device}'

    def __str__(self) -> str:
        return f'C {self.c}, {self.h}×{self.w}, {self.kh}×{self.kw}, {self.what}, {self.setting}'


def working_dtype(dtype: torch.dtype, device: str, channels: int, kw: int) -> torch.dtype:
    """float32 for half precision on a CPU where that is faster than what PyTorch does by itself, else the dtype."""
    if dtype not in _HALF or device != 'cpu':
        return dtype
    # Without oneDNN a float16 convolution takes 70 times as long as in float32 (C 64, 28×28, 27×27: 95 ms and 1.3).
    # In bfloat16, with 2 to 16 channels, at least 32 columns and a kernel wider than 14, oneDNN 3.12 never returns.
    if dtype not in cpu.HERE.onednn or (channels <= 16 and kw > 14):
        return torch.float32
    return dtype
