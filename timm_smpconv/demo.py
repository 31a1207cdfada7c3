"""The demo: train on scikit-learn's real handwritten digits, merge, and show what changed.

Shapes: images (B, 1, 48, 48), logits (B, 10).
"""
import statistics
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple, cast

import timm
import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.data import create_loader, create_transform
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, random_seed, reparameterize_model
from tqdm import tqdm

from .console import robust_output
from .digits import digits
from .files import replace_together
from .plot import Points, draw_kernels

FILES = ('model.safetensors', 'merged.safetensors', 'kernels.png')
IMAGE_SIZE = 48
BATCH_SIZE = 32
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
EMA_DECAY = 0.97


class Digits(torch.utils.data.Dataset):
    """The digits, 8×8, as images. timm's loader sets `transform`."""

    def __init__(self, training: bool):
        self.images, self.labels = digits(training)
        self.transform: Callable = lambda image: image

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def _loader(dataset: Digits, training: bool) -> torch.utils.data.DataLoader:
    shared: Dict[str, Any] = dict(
        input_size=(1, IMAGE_SIZE, IMAGE_SIZE), interpolation='bilinear', mean=(0.3,), std=(0.37,), crop_pct=1.,
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


def _train(model: nn.Module, epochs: int, train: torch.utils.data.DataLoader, held_out) -> nn.Module:
    """Train a model in place, and return the moving average of its weights as a model."""
    ema = ModelEmaV3(model, decay=EMA_DECAY)
    optimizer = create_optimizer_v2(model, 'smpadamw', lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
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
    """Median time of each model's forward pass. The models take turns."""
    times: List[List[float]] = [[] for _ in models]
    for _ in range(rounds + 2):
        for model, record in zip(models, times):
            start = time.perf_counter()
            model(x)
            record.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(record[2:]) for record in times]


def _points(model: Any) -> Dict[str, Points]:
    """The points of channel 0 in the first kernel of each stage but the last, whose feature maps are tiny here."""
    return {
        f'stage {i}, channel 0': (
            *(p.detach().clone() for p in (kernel.coords, kernel.radius, kernel.weight[:, :1])), tuple(kernel.size))
        for i, kernel in enumerate(s.blocks[0].dwconv.large.conv.kernel for s in model.stages[:3])}


def run(name: str, epochs: int, seed: int, out: Path) -> float:
    """Train model `name`, merge it, print a comparison, and write checkpoints and a picture to `out`.

    All three files are written, or none: earlier ones stay as they are until then. They are written even if the reader
    of the output has gone (`| head -n 1`).

    Returns:
        Held-out accuracy of the merged model.

    Raises:
        OSError: The files cannot be written to `out`. Found before training where possible.
        KeyboardInterrupt: Interrupted by Ctrl-C, SIGTERM or SIGHUP. Its message says what was written.
    """
    out = Path(out)
    with robust_output():
        with replace_together(out, FILES, _check_no_folder) as folder:
            accuracy = _run(name, epochs, seed, folder)
        print(f'wrote {", ".join(FILES[:-1])} and {FILES[-1]} to {out}/; to load:')
        arguments = f'"{name}", num_classes=10, in_chans=1'
        print(f'  timm.create_model({arguments}, checkpoint_path="{out / FILES[0]}")')
        print(f'  timm.create_model({arguments}, inference_mode=True, checkpoint_path="{out / FILES[1]}")')
    return accuracy


def _check_no_folder(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f'{path} must be a file or not exist, got a folder')


def _save(model: nn.Module, file: Path) -> None:
    try:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, file)
    except SafetensorError as error:  # the disk is full, for one
        raise OSError(f'could not write {file.name}: {error}') from error


def _run(name: str, epochs: int, seed: int, folder: Path) -> float:
    random_seed(seed)
    datasets = Digits(training=True), Digits(training=False)
    train, held_out = _loader(datasets[0], training=True), _loader(datasets[1], training=False)
    model = timm.create_model(name, num_classes=10, in_chans=1).to(memory_format=torch.channels_last)
    print(
        f'{name} from scratch on {len(datasets[0]):,} handwritten digits of {IMAGE_SIZE}x{IMAGE_SIZE}, '
        f'{len(datasets[1])} held out; seed {seed}, {torch.get_num_threads()} threads, torch {torch.__version__}')
    before = _points(model)
    start = time.perf_counter()
    model = _train(model, epochs, train, held_out)
    seconds = time.perf_counter() - start
    after = _points(model)

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

    figure = draw_kernels([('before', list(before.values())), ('after', list(after.values()))], list(before))
    for file, network in zip(FILES, (model, merged)):
        _save(network, folder / file)
    figure.savefig(folder / FILES[-1], dpi=120)
    return _accuracy(merged_logits, labels)
