"""The LightningModule that trains a sequence network as the authors do, and its learning rate."""
import math
from functools import partial
from typing import Any, Dict, Mapping, Optional, Tuple

import timm
import torch
import torch.nn.functional as F
from lightning import LightningModule
from timm.optim import param_groups_weight_decay
from torch.optim.lr_scheduler import LambdaLR

from ...optim import SMPAdam, smp_param_groups
from ...weights.checkpoint import CheckpointError, checkpoint_filter_fn

__all__ = ['SequenceClassifier', 'rate_factor']

_UNSEEN = ('global_pool', 'radius_range')  # what arguments change although the weights fit


def rate_factor(update: int, warmup: int, total: int, end: float) -> float:
    """The learning rate of an update, relative to the peak: linear from 0, then half a cosine.

    This is exactly the authors' schedule (`smp/optim.py`, `smp/ckconv/nn/lr_scheduler.py`). Its warm-up takes one step
    more than `warmup`, so the cosine starts at (warmup + 1) / warmup of the peak.

    Args:
        update: The number of the update, from 0.
        warmup: The number of updates until the rate reaches the peak.
        total: The number of all updates.
        end: The final rate, relative to the peak.

    Example:
        >>> [round(rate_factor(update, 2, 8, 0.), 3) for update in range(9)]
        [0.0, 0.5, 1.0, 1.5, 1.4, 1.125, 0.75, 0.375, 0.1]
    """
    rise = min(update, warmup + 1) / warmup if warmup else 1.
    fall = min(max(update - warmup - 1, 0) / max(total - warmup, 1), 1.)
    return end + (rise - end) * (1 + math.cos(math.pi * fall)) / 2


class _Schedule(LambdaLR):
    """Resumes at the update of a checkpoint, but computes the rates itself instead of loading them."""

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, 'base_lrs': self.base_lrs})
        self._last_lr = [peak * factor(self.last_epoch) for peak, factor in zip(self.base_lrs, self.lr_lambdas)]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr):
            group['lr'] = rate


def _keep_options(optimizer: torch.optim.Optimizer, state_dict: Dict[str, Any]) -> Dict[str, Any]:
    """Load the optimizer's moments, but not its options."""
    groups = [
        {**own, 'params': loaded['params']} for own, loaded in zip(optimizer.param_groups, state_dict['param_groups'])]
    return {**state_dict, 'param_groups': groups}


class SequenceClassifier(LightningModule):
    """A timm model, trained with cross entropy, `smpadam` and a learning rate that is set at every update.

    The weights in its checkpoints have the names of timm's model, so that `timm.create_model(..., pretrained=True,
    pretrained_cfg_overlay=dict(file=...))` loads them.

    Args:
        name: The name of the model.
        model_args: Other arguments of `timm.create_model`.
        lr: The peak learning rate, positive. Radii get a tenth of it.
        weight_decay: L2 penalty, except on positions, radii, biases and one-dimensional parameters.
        warmup_epochs: The number of epochs in which the rate rises from 0, at least 0.
        min_lr: The final learning rate, positive.
        weights: A checkpoint of this package or of the authors to start from. It is not saved as an option.

    Raises:
        ValueError: An argument breaks the rules above.
    """

    def __init__(
            self,
            name: str,
            model_args: Optional[Dict[str, Any]] = None,
            lr: float = 1e-4,
            weight_decay: float = 1e-5,
            warmup_epochs: int = 5,
            min_lr: float = 1e-6,
            weights: Optional[str] = None,
    ):
        super().__init__()
        for argument, value in (('lr', lr), ('min_lr', min_lr)):
            if not 0 < value < math.inf:
                raise ValueError(f'{argument} must be positive and finite, got {value}')
        if warmup_epochs < 0:
            raise ValueError(f'warmup_epochs must be at least 0, got {warmup_epochs}')
        self.save_hyperparameters(ignore=['weights'])
        pretrained = dict(pretrained=True, pretrained_cfg_overlay=dict(file=weights)) if weights else {}
        self.model = timm.create_model(name, **{**pretrained, **(model_args or {})})
        self.lr, self.weight_decay = lr, weight_decay
        self.warmup_epochs, self.min_lr = warmup_epochs, min_lr

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)

    def training_step(self, batch: Tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        return self._step('train', batch)

    def validation_step(self, batch: Tuple[torch.Tensor, torch.Tensor], index: int) -> None:
        self._step('val', batch)

    def test_step(self, batch: Tuple[torch.Tensor, torch.Tensor], index: int) -> None:
        self._step('test', batch)

    def _step(self, stage: str, batch: Tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x, labels = batch
        logits = self(x)
        loss = F.cross_entropy(logits, labels)
        accuracy = (logits.argmax(1) == labels).float().mean()
        self.log_dict(
            {f'{stage}_loss': loss, f'{stage}_accuracy': accuracy}, prog_bar=True, on_step=False, on_epoch=True,
            sync_dist=True, batch_size=len(labels))
        return loss

    def configure_optimizers(self) -> Any:
        total = self.trainer.estimated_stepping_batches
        if math.isinf(total):
            raise ValueError(f'max_epochs must be at least 1, got {self.trainer.max_epochs}')
        updates = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        groups = smp_param_groups(param_groups_weight_decay(self.model, self.weight_decay))
        # The authors' cosine ends at min_lr for radii, too, and the optimizer scales their steps itself.
        ends = [self.min_lr / group.get('radius_lr_scale', 1.) / self.lr for group in groups]
        optimizer = SMPAdam(groups, lr=self.lr)
        optimizer.register_load_state_dict_pre_hook(_keep_options)
        schedule = _Schedule(optimizer, [
            partial(rate_factor, warmup=self.warmup_epochs * updates, total=int(total), end=end) for end in ends])
        return dict(optimizer=optimizer, lr_scheduler=dict(scheduler=schedule, interval='step'))

    def check_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of another network.

        Args:
            checkpoint: A checkpoint that Lightning saved for a `SequenceClassifier`.

        Raises:
            CheckpointError: The name, the weights or an argument that the weights do not reveal differ.
        """
        found, expected = checkpoint.get('hyper_parameters'), self.hparams
        if not isinstance(found, Mapping) or 'state_dict' not in checkpoint:
            raise CheckpointError(
                'ckpt_path must be a checkpoint of a run, got other weights: give them as model.weights')
        if found.get('name') != expected['name']:
            raise CheckpointError(
                f'ckpt_path must be a checkpoint of {expected["name"]}, got one of {found.get("name")}')
        for argument in _UNSEEN:
            ours, theirs = [(args['model_args'] or {}).get(argument) for args in (expected, found)]
            if ours != theirs:
                raise CheckpointError(
                    f'ckpt_path must be a checkpoint with {argument} = {ours} in model_args, got one with {theirs}')
        try:
            self.model.load_state_dict(checkpoint_filter_fn(checkpoint['state_dict'], self.model))
        except RuntimeError as error:  # a CheckpointError, too
            raise CheckpointError(f'ckpt_path must be a checkpoint of the same network: {error}') from error

    def on_save_checkpoint(self, checkpoint: Dict[str, Any]) -> None:
        checkpoint['state_dict'] = _rename(checkpoint['state_dict'], 'model.', '')

    def on_load_checkpoint(self, checkpoint: Dict[str, Any]) -> None:
        checkpoint['state_dict'] = _rename(checkpoint['state_dict'], '', 'model.')


def _rename(state_dict: Mapping[str, torch.Tensor], old: str, new: str) -> Dict[str, torch.Tensor]:
    return {new + key.removeprefix(old): value for key, value in state_dict.items()}
