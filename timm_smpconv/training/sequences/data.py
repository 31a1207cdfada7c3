"""The data of the six sequence tasks, with the authors' splits, normalisation and augmentation.

Nothing is downloaded. Sources: `smp/datasets` and `smp/dataset_constructor.py` of the authors' code.

N series, C channels, L samples in time.
"""
import gzip
import logging
import math
import struct
import warnings
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, Generator, List, Tuple

import numpy as np
import torch
from lightning import LightningDataModule
from scipy.io import wavfile
from sklearn.model_selection import train_test_split
from sktime.datasets import load_from_tsfile
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchaudio.transforms import MFCC
from torchvision.datasets import CIFAR10, MNIST
from torchvision.datasets.utils import check_integrity
from torchvision.transforms import (
    Compose,
    Normalize,
    RandomAffine,
    RandomApply,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
    RandomRotation,
    ToTensor,
)

from ..._errors import DataError
from ..._files import written_beside
from ...models.smp_tcn import SMPTCN

__all__ = [
    'CharacterTrajectories', 'DataError', 'SequenceData', 'SequentialCIFAR10', 'SequentialMNIST', 'SpeechCommands']

_logger = logging.getLogger(__name__)


class SequenceData(LightningDataModule):
    """Base class: training, validation and test loaders over what `read` returns.

    Args:
        data_dir: Folder of the data, in its original format.
        batch_size: Number of series in a batch, per device.
        num_workers: Number of processes that load batches, per loader.

    Raises:
        ValueError: batch_size is below 1, or num_workers is negative.
    """
    needs: str = ''  # what data_dir must hold
    size: int = 0  # series of the authors' data, all parts together

    def __init__(self, data_dir: str, batch_size: int = 64, num_workers: int = 4):
        super().__init__()
        for argument, value, least in (('batch_size', batch_size, 1), ('num_workers', num_workers, 0)):
            if value < least:
                raise ValueError(f'{argument} must be at least {least}, got {value}')
        self.data_dir = Path(data_dir)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.parts: Dict[str, Dataset] = {}

    def read(self) -> Dict[str, Dataset]:
        """The data sets 'train', 'validation' and 'test'."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Read the data once, and compare them with the model of the trainer, if there is one.

        Raises:
            DataError: The folder does not hold the data, a file is damaged, or series or labels do not fit the model.
        """
        with self._explaining():
            self.parts = self.parts or self.read()
            model = getattr(self.trainer and self.trainer.lightning_module, 'model', None)
            if isinstance(model, SMPTCN):
                self._check_model(model)

    def train_dataloader(self) -> DataLoader:
        return self._loader('train', shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader('validation')

    def test_dataloader(self) -> DataLoader:
        return self._loader('test')

    def _check_model(self, model: SMPTCN) -> None:
        x = self.parts['test'][0][0].flatten(1)  # (C, L); series of all parts have the same shape
        exact = model.stem.permutation is not None
        if len(x) != model.in_chans or x.shape[1] > model.seq_len or (exact and x.shape[1] != model.seq_len):
            raise ValueError(
                f'series have {len(x)} channels and {x.shape[1]} samples, and the model takes {model.in_chans} '
                f'channels and {"" if exact else "at most "}{model.seq_len} samples')
        for part in self.parts.values():
            labels = part.tensors[1] if isinstance(part, TensorDataset) else torch.as_tensor(vars(part)['targets'])
            largest = int(labels.max())
            if largest >= model.num_classes:
                raise ValueError(f'there is a label {largest}, and the model has {model.num_classes} classes')

    def _loader(self, part: str, shuffle: bool = False) -> DataLoader:
        return DataLoader(
            self.parts[part], batch_size=self.batch_size, shuffle=shuffle, num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0, pin_memory=torch.cuda.is_available())

    @contextmanager
    def _explaining(self) -> Generator[None, None, None]:
        """Convert the errors of readers into one error that says what the folder must contain."""
        try:
            yield
        except Exception as error:  # readers raise many types: OSError, EOFError, zlib.error, AssertionError, …
            reason = ' '.join(str(error).split()) or type(error).__name__
            raise DataError(f"data_dir must hold {self.needs}, got '{self.data_dir}': {reason}") from error

    def _check_size(self, found: int) -> None:
        """Warn if the size of the data differs from the paper's."""
        if found != self.size:
            _logger.warning(
                '%s has %d series in the data of the paper, got %d in %s. Accuracies cannot be compared with the '
                'published ones', type(self).__name__, self.size, found, self.data_dir)


class SequentialMNIST(SequenceData):
    """MNIST as (1, 28, 28) images, which the sequence networks read row by row; for sMNIST and pMNIST.

    There is no validation part; validation uses the test images, as in the authors' code. In training, rotation,
    translation, scaling and erasing are each applied with probability 0.5.
    """
    needs = (
        'MNIST/raw/ with train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and '
        't10k-labels-idx1-ubyte, each as it is or as .gz')
    size = 70_000

    def prepare_data(self) -> None:
        """Unpack the .gz files into the same folder, unless this was done before.

        Raises:
            DataError: A file is damaged.
        """
        with self._explaining():
            for file in (self.data_dir / 'MNIST' / 'raw').glob('*-ubyte.gz'):
                if not file.with_suffix('').exists():
                    try:
                        content = gzip.decompress(file.read_bytes())
                    except (OSError, EOFError, zlib.error) as error:
                        raise ValueError(f'{file.name} is damaged: {error}') from error
                    with written_beside(file.parent) as new:
                        (new / file.stem).write_bytes(content)

    def read(self) -> Dict[str, Dataset]:
        to_tensor = [ToTensor(), Normalize((0.1307,), (0.3081,))]
        augment = [
            _half(RandomRotation(30)),
            _half(RandomAffine(0, translate=(2 / 28, 2 / 28))),
            _half(RandomAffine(0, scale=(0.75, 1))),
            *to_tensor,
            RandomErasing(p=0.5, scale=(4 / 28, 4 / 28), ratio=(1, 1)),
        ]
        for part in 'train', 't10k':
            _check_idx(self.data_dir / 'MNIST' / 'raw' / f'{part}-images-idx3-ubyte', 3)
            _check_idx(self.data_dir / 'MNIST' / 'raw' / f'{part}-labels-idx1-ubyte', 1)
        train = MNIST(self.data_dir, train=True, transform=Compose(augment))
        test = MNIST(self.data_dir, train=False, transform=Compose(to_tensor))
        for part in train, test:
            if part.data.shape != (len(part.targets), 28, 28):
                raise ValueError(f'{tuple(part.data.shape)} images and {len(part.targets)} labels')
        self._check_size(len(train) + len(test))
        return dict(train=train, validation=test, test=test)


class SequentialCIFAR10(SequenceData):
    """CIFAR-10 as (3, 32, 32) images, which the sequence networks read row by row.

    There is no validation part; validation uses the test images, as in the authors' code. In training, images are
    flipped at random, padded by 4 and cropped at random.
    """
    needs = 'cifar-10-batches-py/ with data_batch_1 to data_batch_5, test_batch and batches.meta'
    size = 60_000

    def read(self) -> Dict[str, Dataset]:
        to_tensor = [ToTensor(), Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
        augment = [RandomHorizontalFlip(), RandomCrop(32, padding=4), *to_tensor]
        for name, md5 in (*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta['filename'], CIFAR10.meta['md5'])):
            file = self.data_dir / CIFAR10.base_folder / name
            if not file.is_file():
                raise FileNotFoundError(f'there is no {name}')
            if not check_integrity(file, md5):
                raise ValueError(f'{name} is damaged: its MD5 is not {md5}')
        train = CIFAR10(self.data_dir, train=True, transform=Compose(augment))
        test = CIFAR10(self.data_dir, train=False, transform=Compose(to_tensor))
        self._check_size(len(train) + len(test))
        return dict(train=train, validation=test, test=test)


class CharacterTrajectories(SequenceData):
    """Character Trajectories of the UEA archive: (3, 182), pen tips in 20 characters.

    TRAIN and TEST are joined and split again, as in the authors' code. Series are padded with their last sample to the
    length of the longest series, and characters are numbered in the order in which they appear.
    """
    needs = 'CharacterTrajectories_TRAIN.ts and CharacterTrajectories_TEST.ts of the UEA archive of 2018'
    size = 2858

    def read(self) -> Dict[str, Dataset]:
        series: List[List[np.ndarray]] = []  # (N, C, L of the channel)
        names: List[str] = []
        for part in 'TRAIN', 'TEST':
            file = self.data_dir / f'CharacterTrajectories_{part}.ts'
            if not file.is_file():
                raise FileNotFoundError(f'there is no {file.name}')
            try:
                frame, labels = load_from_tsfile(str(file))
            except Exception as error:  # TypeError, OSError, …
                raise ValueError(f'{file.name} is no .ts file of labelled series: {error}') from error
            for row, channels in enumerate(frame.to_numpy()):
                series.append([np.asarray(channel, dtype=np.float32) for channel in channels])
                if not all(len(channel) and np.isfinite(channel).all() for channel in series[-1]):
                    raise ValueError(f'series {row} of {file.name} is empty, or holds NaN or infinity')
                if len(channels) != len(series[0]):
                    raise ValueError(
                        f'series {row} of {file.name} has {len(channels)} channels, the first series {len(series[0])}')
            names.extend(labels)
        length = max(len(channel) for channels in series for channel in channels)
        x = torch.from_numpy(np.stack([  # (N, C, L)
            [np.pad(channel, (0, length - len(channel)), mode='edge') for channel in channels] for channels in series]))
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        self._check_size(len(x))
        return _split_and_normalize(x, torch.tensor([numbers[name] for name in names]))


class SpeechCommands(SequenceData):
    """Ten words of Speech Commands v0.02: samples (1, 16000), or 20 MFCCs (20, 161).

    Clips that do not have 16,000 samples are left out, as in the authors' code. The authors read files in the order of
    the file system; here they are sorted by name, so that the split is the same on every machine.

    Args:
        data_dir: Folder that holds a folder of WAV files for each word.
        batch_size: See `SequenceData`.
        num_workers: See `SequenceData`.
        mfcc: Whether series are MFCCs instead of samples.
    """
    words = ('yes', 'no', 'up', 'down', 'left', 'right', 'on', 'off', 'stop', 'go')
    needs = f'the folders {", ".join(words)} of Speech Commands v0.02, with WAV files of 16 bits and 16 kHz'
    size = 34_975

    def __init__(self, data_dir: str, batch_size: int = 32, num_workers: int = 4, mfcc: bool = True):
        super().__init__(data_dir, batch_size, num_workers)
        self.mfcc = mfcc

    def read(self) -> Dict[str, Dataset]:
        clips: List[np.ndarray] = []
        labels: List[int] = []
        for label, word in enumerate(self.words):
            files = sorted((self.data_dir / word).glob('*.wav'))
            if not files:
                raise FileNotFoundError(f'there is no WAV file in {word}')
            for file in files:
                clip = _read_wav(file)
                if len(clip) == 16_000:
                    clips.append(clip)
                    labels.append(label)
        if not clips:
            raise ValueError('no WAV file has 16,000 samples')
        self._check_size(len(clips))
        x = torch.from_numpy(np.stack(clips)).float().div_(2 ** 15)  # (N, L)
        return _split_and_normalize(mfcc(x) if self.mfcc else x[:, None], torch.tensor(labels))


def mfcc(x: torch.Tensor) -> torch.Tensor:
    """The 20 MFCCs of the authors' Speech Commands task: n_fft 200, hop 100, 64 mel bands, logarithm.

    Args:
        x: (N, L) samples at 16 kHz.

    Returns:
        (N, 20, L // 100 + 1).

    Example:
        >>> mfcc(torch.randn(2, 16000)).shape
        torch.Size([2, 20, 161])
    """
    with warnings.catch_warnings():
        # With 64 bands for 101 frequencies, the lowest bands contain no frequency. That is part of the task.
        warnings.filterwarnings('ignore', 'At least one mel filterbank has all zero values', UserWarning)
        transform = MFCC(16_000, n_mfcc=20, log_mels=True, melkwargs=dict(n_fft=200, n_mels=64))
    return torch.cat([transform(part) for part in x.split(1000)])  # spectra take 20 times the memory of the samples


def split(labels: np.ndarray) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of 70 % of the series for training, 15 % for validation and 15 % for test, stratified by label.

    Example:
        >>> [len(part) for part in split(np.arange(2858) % 20)]
        [2000, 429, 429]
    """
    train, rest = train_test_split(np.arange(len(labels)), train_size=0.7, random_state=0, stratify=labels)
    validation, test = train_test_split(rest, train_size=0.5, random_state=1, stratify=labels[rest])
    return train, validation, test


def _split_and_normalize(x: torch.Tensor, labels: torch.Tensor) -> Dict[str, Dataset]:
    """Normalise every time step by the training part's mean and deviation over series and channels; (N, C, L)."""
    parts = split(labels.numpy())
    train = x[parts[0]]
    mean, std = train.mean((0, 1)), train.std((0, 1))  # (L)
    del train  # raw clips take 2 GB
    x.sub_(mean).div_(std + 1e-5)
    return {
        name: TensorDataset(x[part], labels[part])
        for name, part in zip(('train', 'validation', 'test'), parts)}


def _check_idx(file: Path, dims: int) -> None:
    """Raise an error unless a file of MNIST is there, and as long as its header says."""
    if not file.is_file():
        raise FileNotFoundError(f'there is no {file.name} and no {file.name}.gz')
    with file.open('rb') as stream:
        header = stream.read(4 + 4 * dims)
    if header[:4] != bytes([0, 0, 8, dims]) or len(header) != 4 + 4 * dims:
        raise ValueError(f'{file.name} is not an idx file of bytes in {dims} dimension(s)')
    size, expected = file.stat().st_size, len(header) + math.prod(struct.unpack(f'>{dims}I', header[4:]))
    if size != expected:
        raise ValueError(f'{file.name} is damaged: it has {size} bytes, and {expected} by its header')


def _read_wav(file: Path) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings('error', 'Reached EOF', wavfile.WavFileWarning)  # else a clip that looks short
            rate, clip = wavfile.read(file)
    except Exception as error:  # ValueError, struct.error, WavFileWarning, …
        raise ValueError(f'{file.parent.name}/{file.name} is damaged: {error}') from error
    if rate != 16_000 or clip.dtype != np.int16 or clip.ndim != 1:
        raise ValueError(
            f'{file.parent.name}/{file.name} has {rate} Hz, {clip.dtype} samples and {clip.ndim} dimension(s)')
    return clip


def _half(transform: torch.nn.Module) -> RandomApply:
    return RandomApply([transform], p=0.5)
