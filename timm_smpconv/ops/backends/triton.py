"""Triton programs for tensor cores, in `triton_programs`. Used only on request: no GPU has timed them yet."""
import importlib.util
import os
from typing import Optional

import torch


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
