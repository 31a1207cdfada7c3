"""The merged model in the engines people deploy with, on a CPU: `python -m benchmarks.deploy`.

Needs `pip install '.[export]'` and, for torch.compile, a C++ compiler.
"""
import argparse
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory

import onnxruntime
import openvino
import timm
import torch
import torch._inductor.config
from timm.utils import reparameterize_model

from benchmarks.cpu import shaken
from benchmarks.saving import add_option, saving
from benchmarks.timing import agree, machine, paired
from timm_smpconv import prepack
from timm_smpconv.layers.merged import MergedConv2d
from timm_smpconv.ops import use_backend
from timm_smpconv.ops.dispatch import cpu

DTYPES = {torch.float32: 'f32', torch.bfloat16: 'bf16'}


def engines(merged, batch, folder):
    """A batch of images, and functions from nothing to logits: one merged model in the engines people deploy with.

    And for each dtype the milliseconds of all convolutions, each alone by its fastest way: what eager code could reach
    if nothing else took time and every weight were in the cache. bfloat16 is left out where the CPU has none.
    """
    dtypes = [dtype for dtype in DTYPES if dtype in cpu.HERE.onednn]
    image = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    path = str(Path(folder) / 'merged.onnx')
    torch.onnx.export(
        merged, (torch.randn(2, 3, 224, 224),), path, input_names=['image'], output_names=['logits'], dynamo=True,
        dynamic_shapes={'x': {0: torch.export.Dim('batch', min=1, max=1024)}}, verbose=False)
    runs, convolutions = {}, {}
    for dtype in dtypes:
        model = deepcopy(merged).to(dtype, memory_format=torch.channels_last)
        x = image.to(dtype, memory_format=torch.channels_last)
        networks = {
            'eager': model, 'prepacked': prepack(deepcopy(model)), 'prepacked with images': prepack(deepcopy(model), x),
            'compiled': torch.compile(deepcopy(model))}
        convolutions[dtype] = sum(
            m.kept.milliseconds for m in networks['prepacked with images'].modules() if isinstance(m, MergedConv2d))
        if dtype == torch.float32:
            for layout in (torch.contiguous_format, torch.channels_last):
                networks[f'convnext_tiny, {str(layout)[6:].removesuffix("_format")},'] = timm.create_model(
                    'convnext_tiny').eval().to(memory_format=layout)
        for engine, network in networks.items():
            runs[f'{engine} {str(dtype)[6:]}'] = lambda network=network, x=x: network(x)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    runs['ONNX Runtime float32'] = lambda: torch.from_numpy(session.run(None, {'image': image.numpy()})[0])
    network = openvino.Core().read_model(path)
    network.reshape([batch, 3, 224, 224])  # as exported, with any batch, it is slower
    for dtype in dtypes:
        compiled = openvino.compile_model(network, 'CPU', {
            'INFERENCE_PRECISION_HINT': DTYPES[dtype], 'PERFORMANCE_HINT': 'LATENCY',
            'INFERENCE_NUM_THREADS': torch.get_num_threads()})
        request = compiled.create_infer_request()
        runs[f'OpenVINO {str(dtype)[6:]}'] = lambda r=request: torch.from_numpy(r.infer({0: image.numpy()})[0])
    return image, runs, convolutions


def deploy(name, batch, rounds):
    """Time every engine against plain and compare its logits."""
    model = shaken(name)
    merged = reparameterize_model(model)
    with TemporaryDirectory() as folder, torch.no_grad(), torch._inductor.config.patch(freezing=True):
        image, runs, convolutions = engines(merged, batch, folder)

        def plain():
            with use_backend('native'):
                return model(image)

        expected = plain()
        found = {
            n: agree(n, run(), expected, 0.2 if 'bfloat16' in n else 1e-4) for n, run in runs.items()
            if 'convnext' not in n}
        times = paired({'plain': plain, **runs}, rounds, warmup=1)
    print(f'\nmerged {name}, batch {batch}')
    for dtype, alone in convolutions.items():
        print(f'  every convolution alone, its fastest way, {str(dtype)[6:]}: {alone:.1f} ms')
    for engine, t in sorted(times.items(), key=lambda item: -item[1]):
        logits = f'   logits differ by {found[engine]:.1e} relative' if engine in found else ''
        print(f'  {engine:38} {t:9.1f} ms   plain / this {times["plain"] / t:6.2f}{logits}', flush=True)


def main():
    parser = argparse.ArgumentParser(prog='python -m benchmarks.deploy', description=__doc__.splitlines()[0])
    parser.add_argument('--model', default='smpconv_tiny')
    parser.add_argument('--batch', type=int, nargs='+', default=[1, 16])
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--threads', type=int, help='of every engine, by default as many as torch takes')
    add_option(parser)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    with saving(args.save):
        print(machine(), f'ONNX Runtime {onnxruntime.__version__}, OpenVINO {openvino.__version__}', sep=', ')
        for batch in args.batch:
            deploy(args.model, batch, args.rounds)


if __name__ == '__main__':
    main()
