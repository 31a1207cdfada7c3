"""The classifiers behind the networks, and how they merge.

Shapes: B batch, C channels, H and W height and width, L length.
"""
from copy import deepcopy
from functools import partial
from typing import Any, Callable, Optional, Union

import torch
import torch.nn as nn
from timm.layers import SelectAdaptivePool2d

from ._folding import Convolution, affine
from .merged import MergedConv2d, MergedNorm

__all__ = ['ClassifierHead', 'NormClassifierHead', 'SelectSequencePool']


class SelectSequencePool(nn.Module):
    """Pooling of a sequence to one vector, (B, C, L) → (B, C).

    Args:
        pool_type: 'last' for the last sample, 'avg' or 'max'; '' for none.
    """

    def __init__(self, pool_type: str = 'last'):
        super().__init__()
        if pool_type not in ('last', 'avg', 'max', ''):
            raise ValueError(f"global_pool must be 'last', 'avg', 'max' or '', got {pool_type!r}")
        self.pool_type = pool_type

    def feat_mult(self) -> int:
        """Features of the result per channel."""
        return 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pool_type == 'last':
            return x[..., -1]
        if self.pool_type == 'avg':
            return x.mean(-1)
        if self.pool_type == 'max':
            return x.amax(-1)
        return x

    def extra_repr(self) -> str:
        return f'pool_type={self.pool_type!r}'


def _select_images_pool(pool_type: str) -> SelectAdaptivePool2d:
    return SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))


class ClassifierHead(nn.Module):
    """Global pooling, dropout and a linear classifier.

    (B, C, H, W) or (B, C, L) → (B, num_classes). With num_classes = 0 or `pre_logits`, (B, C). Without pooling the
    classifier is a 1×1 convolution, and the sizes remain.

    Args:
        in_features: C.
        global_pool: What `select_pool` takes; '' for none.
        drop_rate: Dropout in front of the classifier.
        select_pool: Makes the pooling, by default timm's `SelectAdaptivePool2d`.
        init_weight: Sets the start values of the classifier's weight, by default those of the ImageNet networks.
    """

    def __init__(
            self,
            in_features: int,
            num_classes: int,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            select_pool: Callable[[str], nn.Module] = _select_images_pool,
            init_weight: Callable[[torch.Tensor], Any] = partial(nn.init.trunc_normal_, std=0.02),
            device=None,
            dtype=None,
    ):
        super().__init__()
        self.in_features = in_features
        self._select_pool: Any = select_pool
        self._init_weight: Any = init_weight
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, global_pool, device=device, dtype=dtype)

    def reset(self, num_classes: int, global_pool: Optional[str] = None, device=None, dtype=None) -> None:
        """Replace the classifier by a new one, or none for num_classes = 0, and the pooling if given ('' for none)."""
        if num_classes < 0:
            raise ValueError(f'num_classes must be 0 (no classifier) or more, got {num_classes}')
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool: Any = self._select_pool(pool_type)
        self.num_features = self.in_features * self.global_pool.feat_mult()
        self.fc: nn.Module = nn.Identity()
        if num_classes > 0:
            dd = {'device': device, 'dtype': dtype}
            fc: Union[nn.Linear, nn.Conv1d, nn.Conv2d]
            if pool_type:
                fc = nn.Linear(self.num_features, num_classes, **dd)
            elif isinstance(self.global_pool, SelectSequencePool):
                fc = nn.Conv1d(self.num_features, num_classes, 1, **dd)
            else:
                fc = nn.Conv2d(self.num_features, num_classes, 1, **dd)
            self._init_weight(fc.weight)
            if fc.bias is not None:
                nn.init.zeros_(fc.bias)
            self.fc = fc
        self.train(self.training)

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)


class NormClassifierHead(ClassifierHead):
    """BatchNorm and a `ClassifierHead`.

    In the merged head a 1×1 depthwise convolution takes the BatchNorm's place. It is not folded into `fc`, so that
    `get_classifier`, `forward_head(pre_logits=True)` and an assigned `fc` mean the same before and after merging.

    Args:
        in_features: C.
        inference_mode: Build the merged head.
    """

    def __init__(
            self,
            in_features: int,
            num_classes: int,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            inference_mode: bool = False,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__(in_features, num_classes, global_pool, drop_rate, **dd)
        if inference_mode:
            conv = MergedConv2d(in_features, in_features, 1, groups=in_features, **dd)
            nn.init.ones_(conv.weight)
            self.norm: nn.Module = MergedNorm(conv).train()
        else:
            self.norm = nn.BatchNorm2d(in_features, **dd)

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.drop(self.global_pool(self.norm(x)))
        return x if pre_logits else self.fc(x)

    @torch.no_grad()
    def fuse(self) -> 'NormClassifierHead':
        if isinstance(self.norm, (MergedNorm, nn.Identity)):  # merged or pruned already
            return self
        norm: Any = self.norm
        scale, shift = affine(norm, 'norm', self.in_features)
        like = nn.Conv2d(
            self.in_features, self.in_features, 1, groups=self.in_features,
            device='meta', dtype=norm.running_var.dtype)
        merged = deepcopy(self)
        merged.norm = MergedNorm(Convolution(like, scale.reshape(-1, 1, 1, 1), shift).build())
        return merged
