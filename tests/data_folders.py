"""Writes small data folders in the original formats: MNIST, CIFAR-10, Character Trajectories and Speech Commands."""
import gzip
import hashlib
import pickle
import wave

import numpy as np
from torchvision.datasets import CIFAR10

WORDS = ('yes', 'no', 'up', 'down', 'left', 'right', 'on', 'off', 'stop', 'go')


def write_mnist(folder, train=20, test=10):
    """idx files, compressed. Returns the images (N, 28, 28) and labels of both parts."""
    raw = folder / 'MNIST' / 'raw'
    raw.mkdir(parents=True)
    rng, parts = np.random.default_rng(0), []
    for name, count in (('train', train), ('t10k', test)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for kind, array in (('images-idx3', images), ('labels-idx1', labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, '>i4').tobytes()
            (raw / f'{name}-{kind}-ubyte.gz').write_bytes(gzip.compress(header + array.tobytes()))
        parts.append((images, labels))
    return parts


def write_cifar10(folder, train=20, test=10):
    """Pickled batches, as Python wrote them. Returns the images (N, 32, 32, 3) and labels of both parts."""
    batches = folder / 'cifar-10-batches-py'
    batches.mkdir(parents=True)
    rng, parts = np.random.default_rng(0), []
    for names, count in (([f'data_batch_{number}' for number in range(1, 6)], train), (['test_batch'], test)):
        images = rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
        labels = [index % 10 for index in range(count)]
        size = count // len(names)
        for number, name in enumerate(names):
            rows = slice(number * size, (number + 1) * size)
            batch = {'data': images[rows].reshape(size, -1), 'labels': labels[rows], 'batch_label': name}
            (batches / name).write_bytes(pickle.dumps(batch, protocol=2))
        parts.append((images.transpose(0, 2, 3, 1), labels))
    meta = {'label_names': [f'class {label}' for label in range(10)], 'num_vis': 3072}
    (batches / 'batches.meta').write_bytes(pickle.dumps(meta, protocol=2))
    return parts


def crops(image):
    """All crops of an image (32, 32, 3) padded by 4, then those of its mirror image: (162, 32, 32, 3)."""
    found = []
    for flipped in (image, image[:, ::-1]):
        padded = np.pad(flipped, ((4, 4), (4, 4), (0, 0)))
        found += [padded[i:i + 32, j:j + 32] for i in range(9) for j in range(9)]
    return np.stack(found)


def accept_cifar10(folder, patch=setattr):
    """Let torchvision take the batches in a folder for the real ones, whose MD5 it knows."""
    def md5(name):
        return hashlib.md5((folder / 'cifar-10-batches-py' / name).read_bytes()).hexdigest()

    patch(CIFAR10, 'train_list', [[name, md5(name)] for name, _ in CIFAR10.train_list])
    patch(CIFAR10, 'test_list', [[name, md5(name)] for name, _ in CIFAR10.test_list])
    patch(CIFAR10, 'meta', dict(CIFAR10.meta, md5=md5('batches.meta')))


def write_characters(folder, train=30, test=30, longest=182, classes=3):
    """.ts files. Returns the series, (3, L) each, and their labels, TRAIN first."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, series, labels = np.random.default_rng(0), [], []
    for part, count in (('TRAIN', train), ('TEST', test)):
        lines = [
            '#A comment', '@problemName CharacterTrajectories', '@timeStamps false', '@missing false',
            '@univariate false', '@dimensions 3', '@equalLength false', '@classLabel true 1 2 3', '@data']
        for index in range(count):
            length = longest if index == 0 else rng.integers(longest // 3, longest + 1)
            series.append(rng.normal(size=(3, length)).astype(np.float32))
            labels.append(str(classes - index % classes))  # 3 comes first
            channels = [','.join(str(value) for value in channel.tolist()) for channel in series[-1]]
            lines.append(':'.join([*channels, labels[-1]]))
        (folder / f'CharacterTrajectories_{part}.ts').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    return series, labels


def write_wav(file, samples, rate=16_000):
    file.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(file), 'wb') as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(np.asarray(samples, '<i2').tobytes())


def write_words(folder, clips=7):
    """WAV files, of which the first of each word is too short. Returns the others, (N, 16000), and their labels."""
    rng, samples, labels = np.random.default_rng(0), [], []
    for label, word in enumerate(WORDS):
        write_wav(folder / word / '00000000_nohash_0.wav', np.zeros(15_999))
        for clip in range(clips):
            samples.append(rng.integers(-2 ** 15, 2 ** 15, 16_000))
            labels.append(label)
            write_wav(folder / word / f'{clip + 1:08x}_nohash_0.wav', samples[-1])
    return np.stack(samples), labels
