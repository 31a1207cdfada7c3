"""The engines by name, and the precisions."""
from typing import Dict

from .aotinductor import AOTINDUCTOR
from .coreml import COREML
from .engine import Engine
from .executorch import EXECUTORCH
from .ncnn import NCNN
from .onnxruntime import ONNXRUNTIME
from .openvino import OPENVINO
from .torch import COMPILED, PREPACKED, TORCH
from .torch_export import EXPORT

__all__ = ['ENGINES', 'PRECISIONS']

PRECISIONS = ('float32', 'bfloat16', 'int8')

ENGINES: Dict[str, Engine] = {
    'torch': TORCH,
    'torch-prepacked': PREPACKED,
    'torch-compiled': COMPILED,
    'torch-export': EXPORT,
    'torch-aotinductor': AOTINDUCTOR,
    'onnxruntime': ONNXRUNTIME,
    'openvino': OPENVINO,
    'executorch': EXECUTORCH,
    'coreml': COREML,
    'ncnn': NCNN,
}
