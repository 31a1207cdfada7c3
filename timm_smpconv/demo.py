"""The embedded demo: train on scikit-learn's real handwritten digits, merge, and show what changed.

Shapes: images (B, 1, 48, 48), logits (B, 10).
"""
import statistics
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Tuple

import timm
import torch
import torch.nn as nn
from safetensors.torch import save_file
from timm.data import create_loader, create_transform
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, random_seed, reparameterize_model
from tqdm import tqdm

from .digits import digits
from .plot import Points, draw_kernels

IMAGE_SIZE = 48
BATCH_SIZE = 32
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
EMA_DECAY = 0.97


class Digits(torch.utils.data.Dataset):
    """Digits 8×8 as images; timm's loader sets `transform`."""

    def __init__(self, training: bool):
        self.images, self.labels = digits(training)
        self.transform: Callable = lambda image: image

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def _loaders() -> Tuple[torch.utils.data.DataLoader, torch.utils.data.DataLoader]:
    shared = dict(input_size=(1, IMAGE_SIZE, IMAGE_SIZE), interpolation='bilinear', mean=(0.3,), std=(0.37,))
    loaders = []
    for training in (True, False):
        dataset = Digits(training)
        loader = create_loader(
            dataset, shared['input_size'], BATCH_SIZE, is_training=training, use_prefetcher=False, num_workers=0,
            persistent_workers=False)
        dataset.transform = create_transform(
            is_training=training, train_crop_mode='rkrr', scale=(0.7, 1.4), ratio=(0.8, 1.25), hflip=0.,
            color_jitter=None, crop_pct=1., **shared)
        loaders.append(loader)
    return loaders[0], loaders[1]


@torch.inference_mode()
def _logits(model: nn.Module, loader: torch.utils.data.DataLoader) -> Tuple[torch.Tensor, torch.Tensor]:
    model.eval()
    batches = [(model(_channels_last(x)), y) for x, y in loader]
    return torch.cat([z for z, _ in batches]), torch.cat([y for _, y in batches])


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _train(model: nn.Module, epochs: int, train: torch.utils.data.DataLoader, held_out) -> nn.Module:
    """Returns the moving average of the trained model."""
    ema = ModelEmaV3(model, decay=EMA_DECAY)
    optimizer = create_optimizer_v2(model, 'adamw', lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    scheduler, _ = create_scheduler_v2(
        optimizer, 'cosine', num_epochs=epochs, warmup_epochs=min(2, epochs - 1), warmup_lr=LEARNING_RATE / 20,
        min_lr=LEARNING_RATE / 100, step_on_epochs=False, updates_per_epoch=len(train))
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
                scheduler.step_update(updates)
                bar.update()
                bar.set_postfix_str(f'epoch {epoch + 1}/{epochs}, loss {loss.item():.3f}', refresh=False)
            logits, labels = _logits(model, held_out)
            bar.write(f'epoch {epoch + 1}: held-out accuracy {_accuracy(logits, labels):.2%}')
    return ema.module


def _accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return (logits.argmax(1) == labels).float().mean().item()


@torch.inference_mode()
def _milliseconds(models: List[nn.Module], x: torch.Tensor, rounds: int = 15) -> List[float]:
    """Median time of a forward of each model, the models taking turns."""
    times: List[List[float]] = [[] for _ in models]
    for _ in range(rounds + 2):
        for model, record in zip(models, times):
            start = time.perf_counter()
            model(x)
            record.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(record[2:]) for record in times]


def _points(model: nn.Module) -> Dict[str, Points]:
    """The points of channel 0 in the first kernel of each stage but the last, whose maps are tiny here."""
    return {
        f'stage {i}, channel 0': (
            *(p.detach().clone() for p in (kernel.coords, kernel.radius, kernel.weight[:, :1])), tuple(kernel.size))
        for i, kernel in enumerate(s.blocks[0].dwconv.large.conv.kernel for s in model.stages[:3])}


def run(name: str, epochs: int, seed: int, out: Path) -> float:
    """Train model `name`, merge it, print a comparison, and write checkpoints and a picture to `out`.

    Returns:
        Held-out accuracy of the merged model.

    Raises:
        OSError: `out` is no folder that can be written; found before training.
    """
    with _written_whole(Path(out)) as folder:
        return _run(name, epochs, seed, Path(out), folder)


@contextmanager
def _written_whole(out: Path) -> Iterator[Path]:
    """A folder whose files move to `out` at the end; what fails or is interrupted leaves nothing."""
    made = [p for p in (out, *out.parents) if not p.exists()]
    out.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=out) as folder:
            yield Path(folder)
            for file in Path(folder).iterdir():
                file.replace(out / file.name)
    except BaseException:
        for path in made:
            if not any(path.iterdir()):
                path.rmdir()
        raise


def _run(name: str, epochs: int, seed: int, out: Path, folder: Path) -> float:
    random_seed(seed)
    train, held_out = _loaders()
    model = timm.create_model(name, num_classes=10, in_chans=1).to(memory_format=torch.channels_last)
    print(
        f'{name} from scratch on {len(train.dataset):,} handwritten digits of {IMAGE_SIZE}×{IMAGE_SIZE}, '
        f'{len(held_out.dataset)} held out; seed {seed}, {torch.get_num_threads()} threads, torch {torch.__version__}')
    before = _points(model)
    start = time.perf_counter()
    model = _train(model, epochs, train, held_out)
    seconds = time.perf_counter() - start
    after = _points(model)

    merged = reparameterize_model(model.eval())
    (logits, labels), (merged_logits, _) = _logits(model, held_out), _logits(merged, held_out)
    moved = (merged_logits - logits).abs().max().item()
    print(f'trained in {seconds:.0f} s; from here on with the moving average of the weights')
    print(f'merging moved the logits by at most {moved:.1e} ({moved / logits.abs().max().item():.1e} relative)')
    one = _channels_last(next(iter(held_out))[0])
    speed = [_milliseconds([model, merged], x) for x in (one[:1], one)]
    print(f'{"":10}{"accuracy":>10}{"parameters":>12}{"batch 1":>12}{f"batch {len(one)}":>12}')
    for i, (label, network, z) in enumerate((('unmerged', model, logits), ('merged', merged, merged_logits))):
        parameters = sum(p.numel() for p in network.parameters())
        times = ''.join(f'{ms[i]:>9.1f} ms' for ms in speed)
        print(f'{label:10}{_accuracy(z, labels):>10.2%}{parameters:>12,}{times}')

    figure = draw_kernels([('before', list(before.values())), ('after', list(after.values()))], list(before))
    for file, network in (('model.safetensors', model), ('merged.safetensors', merged)):
        save_file({k: v.contiguous() for k, v in network.state_dict().items()}, folder / file)
    figure.savefig(folder / 'kernels.png', dpi=120)
    print(f'wrote model.safetensors, merged.safetensors and kernels.png to {out}/; to load:')
    arguments = f'"{name}", num_classes=10, in_chans=1'
    print(f'  timm.create_model({arguments}, checkpoint_path="{out / "model.safetensors"}")')
    print(f'  timm.create_model({arguments}, inference_mode=True, checkpoint_path="{out / "merged.safetensors"}")')
    return _accuracy(merged_logits, labels)
