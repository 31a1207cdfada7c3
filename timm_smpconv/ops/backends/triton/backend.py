"""Triton programs for tensor cores, in `programs`. They run on request, or where they are found to be the fastest."""
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
    """See `programs.conv`."""
    from . import programs
    return programs.conv(x, weight, bias)


def weight_gradient(grad: torch.Tensor, x: torch.Tensor, kh: int, kw: int) -> torch.Tensor:
    """See `programs.weight_gradient`."""
    from . import programs
    return programs.weight_gradient(grad, x, kh, kw)
