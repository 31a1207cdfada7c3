"""What the operators ask about this CPU: `HERE` alone, at every call. Tests put another CPU in its place."""
from typing import FrozenSet, NamedTuple

import torch

from .. import _private

__all__ = ['CPU', 'HERE']


class CPU(NamedTuple):
    """A kind of CPU.

    Attributes:
        capability: The vector instructions of PyTorch's own programs: 'AVX512', 'AVX2' or 'DEFAULT' on x86, other names
            elsewhere.
        onednn: The dtypes that PyTorch convolves by oneDNN.
    """
    capability: str
    onednn: FrozenSet[torch.dtype]

    def fuses(self, dtype: torch.dtype) -> bool:
        """Whether oneDNN has programs of its own for a convolution with an activation.

        It has on x86 from AVX2 on (`ONEDNN_VERBOSE=1` names them: brgconv_1x1, brg_conv_fwd, brgdmm_dw); elsewhere it
        may compute an activation by its reference program.
        """
        return self.capability in ('AVX512', 'AVX2') and dtype in self.onednn and dtype != torch.float16


HERE = CPU(torch.backends.cpu.get_cpu_capability(), _private.onednn_dtypes())
