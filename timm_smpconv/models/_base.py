"""What the families of networks share: timm's methods, cfgs and building.

Shapes: B batch, C channels, H and W height and width, L length.
"""
import logging
import re
from functools import partial
from typing import TYPE_CHECKING, Any, Dict, Iterable, List, Optional, Sequence, Set, Tuple, Type, Union

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, checkpoint_seq

from ..layers._checks import input_channels
from ..layers.smp_kernel import SMPKernel
from ..ops import requested_backend, use_backend
from ..weights.checkpoint import checkpoint_filter_fn
from ..weights.hub import AUTHORS, prepare_pretrained

__all__ = ['SMPNet', 'build', 'checkpoint_blocks', 'feature_take_indices', 'model_cfg']

_logger = logging.getLogger(__name__)


class SMPNet(nn.Module):
    """Base class of the networks: a stem, a sequence of blocks or stages, and a head.

    Attributes:
        stem: Checks the input, and is the first to compute.
        head: A `ClassifierHead`.
        levels: Name of the `nn.Sequential` between them, whose parts are the levels of `forward_intermediates`.
        input_weights: Names of the weights, of unmerged and merged networks, that meet the input's channels.
        output_fmt: Layout of the intermediates.
    """
    levels = 'blocks'
    input_weights: Tuple[str, ...] = ()
    output_fmt = 'NCHW'
    __jit_unused_properties__ = ('in_chans',)
    pretrained_cfg: Dict[str, Any]  # set by timm's builder
    if TYPE_CHECKING:  # TorchScript would read these
        stem: nn.Module
        blocks: nn.Sequential
        head: Any
        num_classes: int

    @torch.jit.ignore
    def authors_buffers(self) -> Dict[str, torch.Tensor]:
        """Entries of the state dict that the authors' checkpoints do not have, with the values they mean."""
        return {}

    def __init__(self):
        super().__init__()
        self.grad_checkpointing = False

    @property
    def in_chans(self) -> int:
        """Channels of the input: what the first convolution takes."""
        return input_channels(self)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Names of the positions and radii. The points' weights do decay."""
        return {
            f'{name}.{which}' for name, module in self.named_modules() if isinstance(module, SMPKernel)
            for which in ('coords', 'radius')}

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier (none for 0), and the pooling if given ('' for none)."""
        like = next(m.weight for m in self.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d)))
        self.head.reset(num_classes, global_pool, device=like.device, dtype=like.dtype)
        self.num_classes = num_classes
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: Optional[str] = None,
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """The outputs of the levels: stages or blocks.

        Args:
            x: What the network takes.
            indices: An integer n for the last n levels, None for all, or the levels' numbers.
            norm: Apply the head's norm, if it has one, to the last level's output.
            stop_early: Skip the levels after the last one in `indices`.
            output_fmt: Must be 'NCHW', in networks of sequences 'NCL'; that is the default.
            intermediates_only: Return only the list.

        Returns:
            The output of the last level that ran, and the list of intermediates.
        """
        if output_fmt not in (None, 'NCHW', self.output_fmt):  # timm's wrappers ask for 'NCHW', channels first
            raise ValueError(f'output_fmt must be {self.output_fmt!r}, got {output_fmt!r}')
        intermediates = []
        levels = getattr(self, self.levels)
        last = len(levels) - 1
        take_indices, max_index = feature_take_indices(len(levels), indices)
        if stop_early and not torch.jit.is_scripting():
            levels = levels[:max_index + 1]
        x = self.stem(x)
        for i, level in enumerate(levels):
            x = level(x)
            if i in take_indices:
                has_norm = norm and i == last and hasattr(self.head, 'norm')
                intermediates.append(self.head.norm(x) if has_norm else x)
        if intermediates_only:
            return intermediates
        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Remove the levels after the last one in `indices`, and the head's norm and classifier if asked."""
        levels = getattr(self, self.levels)
        take_indices, max_index = feature_take_indices(len(levels), indices)
        setattr(self, self.levels, levels[:max_index + 1])
        if prune_norm and hasattr(self.head, 'norm'):
            self.head.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, '')
        return take_indices

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return self.head(x, pre_logits=pre_logits)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        return dict(stem=r'^stem', blocks=r'^blocks\.(\d+)')

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """What the head takes: the output of the last block."""
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_blocks(self.blocks, x)
        return self.blocks(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def feature_take_indices(
        num_features: int,
        indices: Optional[Union[int, List[int]]] = None,
) -> Tuple[List[int], int]:
    """Resolve the `indices` of `forward_intermediates`, as timm does. Can be compiled by TorchScript.

    Args:
        num_features: Number of features to choose from.
        indices: The last n for an integer, all for None, else a list; negative ones count from the end.

    Returns:
        The chosen indices, counted from 0, and the largest of them.

    Raises:
        ValueError: An index is out of range, or none is chosen.

    Example:
        >>> from timm_smpconv.models._base import feature_take_indices
        >>> feature_take_indices(4, [0, -2])
        ([0, 2], 2)
        >>> feature_take_indices(4, 3)
        ([1, 2, 3], 3)
    """
    if indices is None:
        indices = num_features
    if isinstance(indices, int):
        if not 0 < indices <= num_features:
            raise ValueError(f'indices must be from 1 to {num_features}, got {indices}')
        taken = list(range(num_features - indices, num_features))
    else:
        taken = torch.jit.annotate(List[int], [])
        for index in indices:
            if not -num_features <= index < num_features:
                raise ValueError(f'indices must be from {-num_features} to {num_features - 1}, got {index}')
            taken.append(index % num_features)
        if len(taken) == 0:
            raise ValueError('indices must name at least one feature, got an empty list')
    return taken, max(taken)


def checkpoint_blocks(blocks: Iterable[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """Compute blocks one after the other, and again in the backward pass instead of keeping what is inside them."""
    backend = requested_backend()
    if backend is None:
        return checkpoint_seq(blocks, x)
    # The backward pass computes the blocks again, on GPUs in another thread.
    return checkpoint_seq([partial(_compute_by, backend, block) for block in blocks], x)


def _compute_by(backend: str, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with use_backend(backend):
        return block(x)


def model_cfg(**kwargs: Any) -> Dict[str, Any]:
    """A pretrained cfg with the defaults of the ImageNet networks."""
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.0.conv', 'classifier': 'head.fc',
        'license': 'mit', 'paper_ids': 'arXiv:2304.02330',
        'paper_name': 'SMPConv: Self-moving Point Representations for Continuous Convolution',
        'origin_url': AUTHORS,
        **kwargs,
    }


def build(
        model_cls: Type[SMPNet],
        variant: str,
        pretrained: bool,
        feature_indices: Sequence[int],
        **kwargs: Any,
) -> Any:
    """Build a model by timm's builder, with the weights that `prepare_pretrained` finds."""
    if pretrained:
        kwargs = prepare_pretrained(variant, kwargs)
    model = build_model_with_cfg(
        model_cls, variant, pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=tuple(feature_indices), flatten_sequential=True),
        **kwargs,
    )
    model.pretrained_cfg.pop('state_dict', None)
    if not isinstance(model, model_cls):  # timm's features_only
        model.register_load_state_dict_pre_hook(_name_what_loads)
    return model


def _name_what_loads(model: nn.Module, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
    """A hook of loading, for models of features: their names, `stages_0`, are not those of the whole network."""
    whole = any(re.match(rf'{re.escape(prefix)}(stages|blocks)\.\d', key) for key in state_dict)
    if whole and not hasattr(model, 'stages') and not hasattr(model, 'blocks'):
        _logger.warning(
            'These are weights of the whole network, which do not load into a model of its features. To load a file, '
            'use create_model(..., features_only=True, pretrained=True, pretrained_cfg_overlay=dict(file=FILE))')
