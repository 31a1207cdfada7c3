"""Triton programs for tensor cores, in `triton_programs`. Used on request, or where they win a race."""
import importlib.util
import os
from typing import Callable, Dict, NamedTuple, Optional

import torch

from . import triton_tiles


class Variant(NamedTuple):
    """The programs with other tiles than the default ones. For the fields see `Backend`."""
    conv: Callable[[torch.Tensor, torch.Tensor, Optional[torch.Tensor]], torch.Tensor]
    corr: Callable[[torch.Tensor, torch.Tensor, int, int], torch.Tensor]
    unsupported: Callable[[torch.Tensor], Optional[str]]


def unsupported(x: torch.Tensor) -> Optional[str]:
    """Why it cannot run for this x."""
    if x.device.type not in ('cuda', 'meta') and os.environ.get('TRITON_INTERPRET') != '1':
        return f'triton runs on cuda only (or in its interpreter, with TRITON_INTERPRET=1), x is on {x.device}'
    if importlib.util.find_spec('triton') is None:
        return 'triton is not installed'
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f'triton computes float32, bfloat16 and float16, x is {x.dtype}'
    if x.shape[3] > 128:
        return f'triton takes maps of at most 128 columns, x has {x.shape[3]}'
    return None


# Imported at the first call: this package must import where Triton is not installed.


def conv(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    """See `triton_programs.conv`."""
    from . import triton_programs
    return triton_programs.conv(x, weight, bias)


def corr(grad: torch.Tensor, x: torch.Tensor, k: int, l: int) -> torch.Tensor:
    """See `triton_programs.corr`."""
    from . import triton_programs
    return triton_programs.corr(grad, x, k, l)


def _variant(name: str) -> Variant:
    conv_tile, corr_tile = triton_tiles.VARIANTS[name]

    def conv(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
        from . import triton_programs
        return triton_programs.conv(x, weight, bias, conv_tile)

    def corr(grad: torch.Tensor, x: torch.Tensor, k: int, l: int) -> torch.Tensor:
        from . import triton_programs
        return triton_programs.corr(grad, x, k, l, corr_tile)

    return Variant(conv, corr, lambda x: unsupported(x) or triton_tiles.misfit(name, x))


VARIANTS: Dict[str, Variant] = {name: _variant(name) for name in triton_tiles.VARIANTS}
