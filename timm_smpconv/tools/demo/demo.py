"""The demo: train a network on scikit-learn's real handwritten digits, merge it, and compare.

Sequence networks read the images row by row, as sequences of 64 pixels.

Shapes: images (B, 1, H, W), logits (B, 10).
"""
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple, cast

import timm
import torch
import torch.nn as nn
from safetensors.torch import save
from timm.data import create_loader, create_transform
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, random_seed, reparameterize_model
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from ..._files import check_no_folder, written_beside
from ...layers.smp_kernel import SMPKernel
from ...ops.dispatch.timing import timing
from ..pictures import Picture, Points, draw_kernels, draw_motion, picture_of, points_of, save_figure, save_motion
from .digits import digits

FILES = ('model.safetensors', 'merged.safetensors', 'kernels.png', 'points.gif')
FRAMES = 44  # of points.gif
BATCH_SIZE = 32
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
EMA_DECAY = 0.97
STATISTICS_BATCHES = 10


class _Setup(NamedTuple):
    """Training settings of a network, for about three minutes on two cores."""
    epochs: int
    learning_rate: float
    image_size: int
    model_args: Dict[str, Any]


def _setup(name: str) -> _Setup:
    if name.startswith('smpconv_tcn'):
        return _Setup(16, 4e-3, 8, dict(seq_len=64))
    if name.startswith('smpconv_resnet'):
        return _Setup(6, 2e-3, 8, {})
    return _Setup(9, 2e-3, 48, {})


class Digits(torch.utils.data.Dataset):
    """The digits, 8×8, as images. timm's loader sets `transform`."""

    def __init__(self, training: bool):
        self.images, self.labels = digits(training)
        self.transform: Callable = lambda image: image

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def _loader(dataset: Digits, size: int, training: bool) -> torch.utils.data.DataLoader:
    shared: Dict[str, Any] = dict(
        input_size=(1, size, size), interpolation='bilinear', mean=(0.3,), std=(0.37,), crop_pct=1.,
        color_jitter=None)
    loader = create_loader(
        cast(Any, dataset), shared['input_size'], BATCH_SIZE, is_training=training, use_prefetcher=False, num_workers=0,
        persistent_workers=False)
    dataset.transform = create_transform(
        is_training=training, train_crop_mode='rkrr', scale=(0.7, 1.4), ratio=(0.8, 1.25), hflip=0., **shared)
    return loader


@torch.inference_mode()
def _logits(model: nn.Module, loader: torch.utils.data.DataLoader) -> Tuple[torch.Tensor, torch.Tensor]:
    model.eval()
    batches = [(model(_channels_last(x)), y) for x, y in loader]
    return torch.cat([z for z, _ in batches]), torch.cat([y for _, y in batches])


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


class _Motion:
    """The points of the first channel of each kernel of a model, at evenly spaced moments of the training.

    During training the points are only copied. They are drawn afterwards.
    """

    def __init__(self, model: nn.Module, updates: int):
        self._kernels = {name: module for name, module in model.named_modules() if isinstance(module, SMPKernel)}
        frames = min(FRAMES, updates + 1)
        self._moments = {round(i * updates / (frames - 1)) for i in range(frames)}
        self._updates = updates
        self._seen: Dict[int, List[Points]] = {}
        self.see(0)

    def see(self, update: int) -> None:
        if update in self._moments:
            self._seen[update] = [points_of(kernel) for kernel in self._kernels.values()]

    def frames(self) -> List[Tuple[str, Picture]]:
        """(title, picture) at each moment, of the kernel whose points moved furthest, in samples."""
        first, last = self._seen[0], self._seen[max(self._seen)]
        distances = [
            ((b.coords - a.coords).abs().mean() * max(kernel.size)).item()
            for a, b, kernel in zip(first, last, self._kernels.values())]
        chosen = distances.index(max(distances))
        name, kernel = list(self._kernels.items())[chosen]
        return [
            (f'{_place(name)}\nupdate {update} of {self._updates}', picture_of(kernel, points=points[chosen]))
            for update, points in self._seen.items()]


def _place(name: str) -> str:
    return f'{name.removesuffix(".large.conv.kernel")}, channel 0'


def _train(
        model: nn.Module,
        epochs: int,
        learning_rate: float,
        train: torch.utils.data.DataLoader,
        held_out: torch.utils.data.DataLoader,
) -> Tuple[nn.Module, _Motion]:
    """Train a model in place.

    Returns:
        A model with the moving average of its weights, whose BatchNorm statistics are taken anew after each epoch.
        The motion of its points.
    """
    ema = ModelEmaV3(model, decay=EMA_DECAY)
    motion = _Motion(ema.module, epochs * len(train))
    optimizer = create_optimizer_v2(model, 'smpadamw', lr=learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
    scheduler, _ = create_scheduler_v2(
        optimizer, 'cosine', num_epochs=epochs, warmup_epochs=min(2, epochs - 1), warmup_lr=learning_rate / 20,
        min_lr=learning_rate / 100, step_on_epochs=False, updates_per_epoch=len(train))
    criterion = LabelSmoothingCrossEntropy(LABEL_SMOOTHING)
    updates = 0
    with tqdm(total=epochs * len(train), unit='update') as bar:
        for epoch in range(epochs):
            model.train()
            for x, y in train:
                loss = criterion(model(_channels_last(x)), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                ema.update(model)
                updates += 1
                motion.see(updates)
                scheduler.step_update(updates)
                bar.update()
                bar.set_postfix_str(f'epoch {epoch + 1}/{epochs}, loss {loss.item():.3f}', refresh=False)
            # The average of the statistics lags far behind that of the weights, and so do the model's own at first.
            update_bn((_channels_last(x) for x, _ in islice(train, STATISTICS_BATCHES)), ema.module)
            logits, labels = _logits(ema.module, held_out)
            bar.write(f'epoch {epoch + 1}: held-out accuracy {_accuracy(logits, labels):.2%}')
    return ema.module, motion


def _accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return (logits.argmax(1) == labels).float().mean().item()


@torch.inference_mode()
def _milliseconds(models: List[nn.Module], x: torch.Tensor) -> List[float]:
    """The time of each model's forward pass."""
    return list(timing({str(i): partial(model, x) for i, model in enumerate(models)}, rounds=15).values())


def _pictures(model: nn.Module) -> Dict[str, Picture]:
    """Maps names of kernels to their first channels, for the first kernel of each of the first three quarters."""
    kernels = [(name, module) for name, module in model.named_modules() if isinstance(module, SMPKernel)]
    chosen = (kernels[len(kernels) * i // 4] for i in range(3))
    return {_place(name): picture_of(kernel) for name, kernel in chosen}


def run(name: str, epochs: Optional[int], seed: int, out: Path) -> float:
    """Train model `name`, merge it, print a comparison, and write checkpoints and pictures to `out`.

    Earlier files stay as they are until all are written; an error or Ctrl-C leaves them so.

    Args:
        name: One of this package's models.
        epochs: By default as many as take about three minutes on two cores.
        seed: Of all random numbers.
        out: A folder, which is created if it does not exist.

    Returns:
        Held-out accuracy of the merged model.

    Raises:
        OSError: The files cannot be written to `out`. Found before training where possible.
    """
    out, setup = Path(out), _setup(name)
    for file in FILES:
        check_no_folder(out / file)
    with written_beside(out) as folder:
        accuracy = _run(name, setup, epochs or setup.epochs, seed, folder)
    print(f'wrote {", ".join(FILES[:-1])} and {FILES[-1]} to {out}/; to load:')
    arguments = ', '.join([f'"{name}"', *(f'{k}={v}' for k, v in _model_args(setup).items())])
    print(f'  timm.create_model({arguments}, checkpoint_path="{out / FILES[0]}")')
    print(f'  timm.create_model({arguments}, inference_mode=True, checkpoint_path="{out / FILES[1]}")')
    return accuracy


def _model_args(setup: _Setup) -> Dict[str, Any]:
    return dict(num_classes=10, in_chans=1, **setup.model_args)


def _run(name: str, setup: _Setup, epochs: int, seed: int, folder: Path) -> float:
    random_seed(seed)
    datasets = Digits(training=True), Digits(training=False)
    size = setup.image_size
    train, held_out = (_loader(dataset, size, training=dataset is datasets[0]) for dataset in datasets)
    model = timm.create_model(name, **_model_args(setup))
    model = model.to(memory_format=torch.channels_last)
    form = ', read row by row' if 'seq_len' in setup.model_args else ''
    print(
        f'{name} from scratch on {len(datasets[0]):,} handwritten digits of {size}x{size}{form}, '
        f'{len(datasets[1])} held out; seed {seed}, {torch.get_num_threads()} threads, torch {torch.__version__}')
    before = _pictures(model)
    start = time.perf_counter()
    model, motion = _train(model, epochs, setup.learning_rate, train, held_out)
    seconds = time.perf_counter() - start
    after = _pictures(model)

    merged = reparameterize_model(model.eval())
    (logits, labels), (merged_logits, _) = _logits(model, held_out), _logits(merged, held_out)
    moved = (merged_logits - logits).abs().max().item()
    print(f'trained in {seconds:.0f} s; all that follows uses the moving average of the weights')
    print(f'merging moved the logits by at most {moved:.1e} ({moved / logits.abs().max().item():.1e} relative)')
    one = _channels_last(next(iter(held_out))[0])
    speed = [_milliseconds([model, merged], x) for x in (one[:1], one)]
    print(f'{"":10}{"accuracy":>10}{"parameters":>12}{"batch 1":>12}{f"batch {len(one)}":>12}')
    for i, (label, network, z) in enumerate((('unmerged', model, logits), ('merged', merged, merged_logits))):
        parameters = sum(p.numel() for p in network.parameters())
        times = ''.join(f'{ms[i]:>9.1f} ms' for ms in speed)
        print(f'{label:10}{_accuracy(z, labels):>10.2%}{parameters:>12,}{times}')

    for file, network in zip(FILES, (model, merged)):
        # Not by `save_file`, whose files only their owner may read.
        (folder / file).write_bytes(save({k: v.contiguous() for k, v in network.state_dict().items()}))
    moved_points = {name: picture._replace(before=before[name].points) for name, picture in after.items()}
    rows = {
        f'{name}\n{moment}': picture
        for moment, row in (('before', before), ('after', moved_points)) for name, picture in row.items()}
    save_figure(draw_kernels(rows, columns=len(before)), folder / FILES[2])
    save_motion(draw_motion(motion.frames()), folder / FILES[3])
    return _accuracy(merged_logits, labels)
