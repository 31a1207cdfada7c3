"""What is deployed: the network, what its files say of themselves, and the graphs that are written into them.

Shapes: B batch, C channels, H and W height and width, L length of a sequence.
"""
import hashlib
import importlib
import sys
from copy import deepcopy
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import timm
import torch
import torch.nn as nn
from safetensors.torch import save
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.utils import reparameterize_model

from ..._errors import DataError
from ...layers.merged import MERGED_CONVS
from ...layers.smp_kernel import SMPKernel
from ...models.from_checkpoint import arguments_of, build_network
from ...surgery.plain import to_plain
from ...surgery.replace import tensors
from ...weights.checkpoint import read_checkpoint, select_weights
from ...weights.hub import file_sha256
from ..images import data_config

__all__ = ['Network', 'Outputs', 'Run', 'Source', 'contiguous', 'count_convolutions', 'read_network', 'runner']

Outputs = Tuple[torch.Tensor, ...]
Run = Callable[[torch.Tensor], Outputs]
PACKAGES = ('timm-smpconv', 'torch', 'timm', 'onnx', 'onnxscript', 'onnxruntime', 'openvino', 'nncf')


class Network(NamedTuple):
    """A network as its files describe it.

    Attributes:
        model: Its name in timm, or a Python path `module:function` of a function that returns it.
        arguments: Of `timm.create_model`.
        task: 'classification', 'segmentation' or 'features'.
        input_size: (C, H, W), or (C, L) of sequences.
        data: Of images, what `timm.data.create_transform` takes: mean, std, interpolation, crop_pct and crop_mode.
        preprocess: 'in-graph' if graphs take pixels in uint8 and normalise them, else 'outside'.
        classes: Their names, where they are known.
        sha256: Of the checkpoint, or of the weights, as safetensors writes them, where there is none.
        versions: Of the packages that wrote the files.
        packs: Whether `prepack` takes it.
    """
    model: str
    arguments: Dict[str, Any]
    task: str
    input_size: Sequence[int]
    data: Dict[str, Any]
    preprocess: str
    classes: List[str]
    sha256: str
    versions: Dict[str, str]
    packs: bool

    @property
    def input_name(self) -> str:
        return 'image' if self.data else 'sequence'

    @property
    def output_name(self) -> str:
        """Of the first output."""
        return {'classification': 'logits', 'segmentation': 'masks'}.get(self.task, 'features_0')

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """Pixels (B, C, H, W) in uint8 as the network takes them. Sequences stay as they are."""
        if not self.data:
            return x
        mean, std = (torch.tensor(self.data[key]).view(-1, 1, 1) for key in ('mean', 'std'))
        return (x.float() / 255 - mean) / std

    def build(self) -> nn.Module:
        """The merged network with initial weights."""
        return _merge(_function(self.model)() if ':' in self.model else _create(self.model, self.arguments, self.task))


class Graph(nn.Module):
    """A network in one precision behind the normalisation, if that belongs into the graph.

    Takes float32, or pixels in uint8. Returns the only tensor, or all that the network returns, in the precision.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype, normalize: Optional[Callable]):
        super().__init__()
        self.network = network
        self.dtype = dtype
        self.normalize = normalize

    def forward(self, x):
        x = x if self.normalize is None else self.normalize(x)
        found = tensors(self.network(x.to(self.dtype)))
        return found[0] if len(found) == 1 else tuple(found)


class Source:
    """A network on its way into files.

    Attributes:
        network: What is said of it.
        merged: The merged network.
        batch: The size of the batch that graphs are traced with.
        calibration: Inputs of graphs to quantise with, if there are any.
        validation: Inputs to measure on, one by one, each with its label, or else the class that the reference gives.
        max_drop: How many percent of right classes quantising may cost.
    """

    def __init__(self, network: Network, merged: nn.Module, batch: int, max_drop: float):
        self.network, self.merged, self.batch, self.max_drop = network, merged, batch, max_drop
        self.calibration: Optional[torch.Tensor] = None
        self.validation: List[Tuple[torch.Tensor, torch.Tensor]] = []
        self.program = lru_cache(None)(self._program)
        self.onnx = lru_cache(None)(self._onnx)
        self._temporary = TemporaryDirectory(prefix='timm-smpconv-')
        self.folder = Path(self._temporary.name)

    def inputs(self, batch: int) -> torch.Tensor:
        """An input of a graph: pixels, or what the network takes."""
        size = (batch, *self.network.input_size)
        in_graph = self.network.preprocess == 'in-graph'
        return torch.randint(256, size, dtype=torch.uint8) if in_graph else torch.randn(size)

    def graph(self, merged: nn.Module, precision: str = 'float32') -> nn.Module:
        """A module in this precision that takes what graphs take."""
        dtype = torch.bfloat16 if precision == 'bfloat16' else torch.float32
        normalize = self.network.normalize if self.network.preprocess == 'in-graph' else None
        return Graph(merged.to(dtype), dtype, normalize).eval()

    def _program(self, precision: str) -> torch.export.ExportedProgram:
        """The exported graph of the merged network, for any batch."""
        with torch.no_grad():
            return torch.export.export(
                self.graph(deepcopy(self.merged), precision), (self.inputs(self.batch),),
                dynamic_shapes=({0: torch.export.Dim('batch', min=1, max=1024)},))

    def single(self) -> Tuple[nn.Module, torch.Tensor]:
        """A module of PyTorch's own modules, and an input of a batch of 1: what converters for devices read."""
        return self.graph(to_plain(self.merged)), self.inputs(1)

    def _onnx(self) -> Path:
        """The ONNX file of the program, without metadata."""
        program, path = self.program('float32'), self.folder / 'model.onnx'
        outputs = len(program.graph_signature.user_outputs)
        name = self.network.output_name
        torch.onnx.export(
            program, (), str(path), input_names=[self.network.input_name], dynamo=True, external_data=False,
            output_names=[name, *(f'{name.removesuffix("_0")}_{i}' for i in range(1, outputs))], verbose=False)
        return path


def runner(network: Callable) -> Run:
    """The network as a function that returns all its tensors."""
    @torch.no_grad()
    def run(x: torch.Tensor) -> Outputs:
        return tuple(tensors(network(x)))
    return run


def count_convolutions(program: torch.export.ExportedProgram) -> int:
    """The convolutions of an exported graph."""
    return sum(node.op == 'call_function' and 'conv' in str(node.target) for node in program.graph.nodes)


def read_network(
        name: str,
        checkpoint: Optional[Path],
        pretrained: bool,
        task: str,
        image_size: Optional[int],
        preprocess: str,
        data: Dict[str, Any],
) -> Tuple[Network, nn.Module, nn.Module]:
    """A network, unmerged and merged, and its description.

    Args:
        name: See `Network.model`.
        checkpoint: Its weights.
        pretrained: Without a checkpoint: take the weights that timm downloads.
        task: See `Network`.
        image_size: Height and width, by default the model's own.
        preprocess: See `Network`.
        data: Settings of `timm.data.create_transform` that replace the model's own, as far as they are not None.

    Raises:
        ValueError: An argument breaks a rule.
        DataError: The weights cannot be read, or do not fit.
    """
    arguments: Dict[str, Any] = {}
    if ':' in name:
        if task == 'features' or pretrained:
            raise ValueError('--features and --pretrained must go with a name of timm, got a Python path')
        reference = _function(name)()
        if checkpoint is not None:
            try:
                reference.load_state_dict(select_weights(read_checkpoint(checkpoint))[0])
            except RuntimeError as error:
                raise DataError(f'{checkpoint} must be a checkpoint of {name}, got: {error}') from error
    else:
        reference = build_network(name, checkpoint, pretrained)
        arguments = arguments_of(reference, reference.state_dict()) if checkpoint else {}
    like: Any = reference  # the whole model
    if task == 'features':
        if not hasattr(reference, 'forward_intermediates'):
            raise ValueError(f'--features must go with a model that has forward_intermediates, got {name}')
        backbone: Any = _create(name, arguments, task)
        backbone.model.load_state_dict(like.state_dict(), strict=False)  # without its head
        reference = backbone
    reference = reference.eval()
    merged = _merge(reference)
    if hasattr(like, 'seq_len'):
        if image_size or preprocess == 'in-graph' or any(value is not None for value in data.values()):
            raise ValueError(f'options of images must go with a network of images, got {name}')
        size: Any = [like.in_chans, like.seq_len]
        config = {}
    else:
        resolved = data_config(like, image_size, **{key: value for key, value in data.items() if value is not None})
        for key in 'mean', 'std':
            if len(resolved[key]) != resolved['input_size'][0]:
                raise ValueError(
                    f'--{key} must be a number for each of {resolved["input_size"][0]} channels, got {resolved[key]}')
        size = list(resolved.pop('input_size'))
        config = {key: list(v) if isinstance(v, tuple) else v for key, v in resolved.items()}
    classes = infer_imagenet_subset(like) if task == 'classification' and config else None
    return Network(
        name, arguments, task, size, config, preprocess,
        ImageNetInfo(classes).label_descriptions() if classes else [],  # type: ignore[arg-type]
        file_sha256(checkpoint) if checkpoint else hashlib.sha256(save(contiguous(reference))).hexdigest(),
        {package: found for package in PACKAGES if (found := _version(package))},
        any(isinstance(m, MERGED_CONVS) for m in merged.modules()),
    ), reference, merged


def contiguous(model: nn.Module) -> Dict[str, torch.Tensor]:
    """A state dict as safetensors takes it: contiguous, and no two tensors of one memory."""
    return {key: value.clone(memory_format=torch.contiguous_format) for key, value in model.state_dict().items()}


def _merge(model: nn.Module) -> nn.Module:
    merged = reparameterize_model(model.eval())
    left = next((name for name, module in merged.named_modules() if isinstance(module, SMPKernel)), None)
    if left is not None:
        raise DataError(f'MODEL must be a network that can be merged, got one that keeps the kernel {left}')
    return merged


def _create(name: str, arguments: Dict[str, Any], task: str) -> nn.Module:
    features: Dict[str, Any] = dict(features_only=True, feature_cls='getter') if task == 'features' else {}
    return timm.create_model(name, **arguments, **features)


def _function(path: str) -> Callable[[], nn.Module]:
    module, _, name = path.partition(':')
    if '' not in sys.path:
        sys.path.insert(0, '')  # the current folder, as for `python -m`
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f'MODEL must be a model of timm or module:function, got {path}: {error}') from error


def _version(package: str) -> Optional[str]:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
