"""The command `timm-smpconv sequence`: Lightning's command line for the sequence tasks."""
from typing import Any, Dict, List, Optional, Set

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ...weights.checkpoint import CheckpointError, read_checkpoint
from .data import SequenceData
from .training import SequenceClassifier

__all__ = ['run']


class _SequenceCLI(LightningCLI):
    """Adds `--data-dir` and options for checkpoints."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument('--data-dir', type=str, default='', help='folder of the data (required)')
        parser.link_arguments('data_dir', 'data.init_args.data_dir')
        parser.add_lightning_class_args(ModelCheckpoint, 'checkpoint')
        parser.set_defaults({
            'checkpoint.monitor': 'val_accuracy', 'checkpoint.mode': 'max', 'checkpoint.save_last': True,
            'checkpoint.filename': '{epoch}-{val_accuracy:.4f}'})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)  # Lightning's own warns if sys.argv holds arguments, as ours does
        if not self.config[self.config.subcommand].data_dir:  # otherwise the link to data.init_args fails
            parser.error('--data-dir must be the folder of the data, got none')

    def _parse_ckpt_path(self) -> None:
        """Does nothing: Lightning's method replaces the options of the model by those in the checkpoint."""

    def instantiate_classes(self) -> None:
        options = self.config[self.subcommand]
        if options.ckpt_path:
            options.model.weights = None  # all weights come from the checkpoint, and that file may be gone
        try:
            super().instantiate_classes()
            if self.subcommand == 'fit' and self.trainer.max_epochs == self.trainer.max_steps == -1:
                raise ValueError('max_epochs must be at least 1, got -1')
        except CheckpointError:
            raise
        except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:  # timm has no class for it
            raise ValueError(f'options must describe a model, data and a trainer: {error}') from error
        if options.ckpt_path:
            self.model.check_checkpoint(read_checkpoint(options.ckpt_path))

    @staticmethod
    def subcommands() -> Dict[str, Set[str]]:
        commands = LightningCLI.subcommands()
        return {name: commands[name] for name in ('fit', 'validate', 'test')}


def run(args: Optional[List[str]] = None) -> Any:
    """Train, validate or test.

    Args:
        args: Arguments of the command, from `fit`, `validate` or `test` on.

    Returns:
        Lightning's command line object, with `trainer`, `model` and `datamodule`.

    Raises:
        CheckpointError: The checkpoint is damaged, or is one of another network.
        DataError: The data folder is incomplete or damaged, or its data do not fit the model.
        ValueError: A model, data or a trainer cannot be made of the options.
        SystemExit: An argument cannot be parsed, or help was asked for.
    """
    return _SequenceCLI(
        SequenceClassifier, SequenceData, subclass_mode_data=True, auto_configure_optimizers=False, args=args,
        parser_kwargs=dict(prog='timm-smpconv sequence'), save_config_kwargs=dict(overwrite=True),
        load_from_checkpoint_support=False)  # so that the model alone says what checkpoints keep
