"""The merged model in int8, by the engines that quantise for a CPU: `python -m benchmarks.quantize`.

The demo's network on the digits, for accuracy, file size and time, and smpconv_tiny at 224 with random weights, for
size and time. Needs `pip install '.[demo,export,quantize]'`, and torchao with a C++ compiler for the engine of that
name. An engine that is not installed is skipped.

Shapes: images (B, C, H, W), logits (B, 10).
"""
import argparse
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Callable, Dict, List, NamedTuple

import timm
import torch
import torch._inductor.config
from timm.utils import reparameterize_model

from benchmarks.cpu import shaken
from benchmarks.saving import add_option, saving
from benchmarks.timing import machine, paired
from timm_smpconv.tools.demo import demo

DEMO = 'smpconv_mobile31'
Run = Callable[[torch.Tensor], torch.Tensor]


class Network(NamedTuple):
    """A model in one precision: its file, and a function from a batch size to one from images to logits."""
    megabytes: float
    load: Callable[[int], Run]


def megabytes(*files: Path) -> float:
    return sum(file.stat().st_size for file in files) / 1e6


def export(merged: torch.nn.Module, image: torch.Tensor, file: Path) -> None:
    torch.onnx.export(
        merged, (image,), str(file), input_names=['image'], output_names=['logits'], dynamo=True, external_data=False,
        dynamic_shapes={'x': {0: torch.export.Dim('batch', min=1, max=1024)}}, verbose=False)


def by_openvino(merged: torch.nn.Module, file: Path, calibration: torch.Tensor) -> Dict[str, Network]:
    """NNCF's int8 in OpenVINO; what stays floating point beside it is float32."""
    import nncf
    import openvino

    def load(network, hint, batch):
        network = network.clone()
        network.reshape([batch, *calibration.shape[1:]])
        compiled = openvino.compile_model(network, 'CPU', {
            'INFERENCE_PRECISION_HINT': hint, 'PERFORMANCE_HINT': 'LATENCY',
            'INFERENCE_NUM_THREADS': torch.get_num_threads()})
        request = compiled.create_infer_request()
        return lambda x: torch.from_numpy(request.infer({0: x.numpy()})[0].copy())

    network = openvino.convert_model(file)  # after read_model, NNCF misses the weights of the grouped convolutions
    images = [image[None].numpy() for image in calibration]
    quantized = nncf.quantize(network, nncf.Dataset(images), subset_size=len(images))
    kinds = {'float32': (network, 'f32'), 'bfloat16': (network, 'bf16'), 'int8': (quantized, 'f32')}
    if 'BF16' not in openvino.Core().get_property('CPU', 'OPTIMIZATION_CAPABILITIES'):
        del kinds['bfloat16']
    networks = {}
    for kind, (found, hint) in kinds.items():
        path = file.with_name(f'{kind}.xml')
        openvino.save_model(found, path, compress_to_fp16=kind == 'bfloat16')
        networks[kind] = Network(megabytes(path, path.with_suffix('.bin')), partial(load, found, hint))
    return networks


def by_onnxruntime(merged: torch.nn.Module, file: Path, calibration: torch.Tensor) -> Dict[str, Network]:
    """QDQ files of ONNX Runtime: a scale per channel for weights, activations unsigned or signed."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Images(CalibrationDataReader):
        def __init__(self):
            self.batches = iter(calibration.split(32))

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {'image': batch.numpy()}

    def load(path, batch):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
        return lambda x: torch.from_numpy(session.run(None, {'image': x.numpy()})[0])

    files = {'float32': file}
    for kind, arguments in {
        'int8': dict(activation_type=QuantType.QUInt8),
        'int8, 7-bit weights': dict(activation_type=QuantType.QUInt8, reduce_range=True),
        'int8, signed': dict(activation_type=QuantType.QInt8),
        'int8, one scale': dict(activation_type=QuantType.QUInt8, per_channel=False),
    }.items():
        files[kind] = file.with_name(f'{kind}.onnx')
        quantize_static(
            file, files[kind], Images(), quant_format=QuantFormat.QDQ, weight_type=QuantType.QInt8,
            **{'per_channel': True, **arguments})
    return {kind: Network(megabytes(path), partial(load, path)) for kind, path in files.items()}


def by_torchao(merged: torch.nn.Module, file: Path, calibration: torch.Tensor) -> Dict[str, Network]:
    """PT2E for x86, compiled with freezing. The int8 file holds the float32 weights as well."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    def channels_last(x):
        return x.contiguous(memory_format=torch.channels_last)

    def load(network, batch):
        torch._dynamo.reset()
        compiled = torch.compile(network, dynamic=False)
        return lambda x: compiled(channels_last(x))

    merged = merged.to(memory_format=torch.channels_last)
    dynamic = {'x': {0: torch.export.Dim('batch', min=1, max=1024)}}
    image = channels_last(calibration[:2].clone())  # a view would put all images into the files
    # Strict, so that the nodes say that they come from F.conv2d: it is what the quantiser looks for.
    exported = torch.export.export(merged, (image,), dynamic_shapes=dynamic, strict=True)
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported.module(), quantizer)
    for batch in calibration.split(32):
        prepared(channels_last(batch))
    quantized = convert_pt2e(prepared)
    path = file.with_name('int8.pt2')
    torch.export.save(torch.export.export(quantized, (image,)), path)
    float_path = file.with_name('float32.pt2')
    torch.export.save(exported, float_path)
    return {
        'float32': Network(megabytes(float_path), partial(load, merged)),
        'int8': Network(megabytes(path), partial(load, quantized))}


ENGINES = {
    'openvino': (by_openvino, ('openvino', 'nncf')),
    'onnxruntime': (by_onnxruntime, ('onnxruntime',)),
    'torchao': (by_torchao, ('torchao',)),
}


def compare(
        engine: str,
        merged: torch.nn.Module,
        calibration: torch.Tensor,
        images: torch.Tensor,
        labels: torch.Tensor,
        rounds: List[int],
) -> None:
    """Print a table of an engine's precisions.

    Args:
        engine: Of `ENGINES`.
        merged: The model.
        calibration: Images that the ranges of the activations are taken from.
        images: At least 16.
        labels: Of all images, or none if the model is not trained.
        rounds: For batches of 1 and of 16.
    """
    print(f'  {engine:32}{"accuracy":>9}{"MB":>8}{"batch 1":>19}{"batch 16":>19}   ms, float32 / this')
    with TemporaryDirectory() as folder:
        file = Path(folder, 'merged.onnx')
        export(merged, images[:2], file)
        networks = ENGINES[engine][0](merged, file, calibration)
        accuracy, times = {}, []
        for batch, n in zip((1, 16), rounds):
            runs = {}
            for kind, network in list(networks.items()):
                try:
                    runs[kind] = network.load(batch)
                except RuntimeError as error:  # bfloat16 in OpenVINO, with ONEDNN_MAX_CPU_ISA=AVX2
                    print(f'    {kind} does not load: {" ".join(str(error).split())}')
                    del networks[kind]
            if batch == 1:
                for kind, run in runs.items():
                    found = [run(image[None]).argmax(1) for image in images[:len(labels)]]
                    accuracy[kind] = f'{(torch.cat(found) == labels).float().mean():.2%}' if found else ''
            x = images[:batch].contiguous()
            times.append(paired({kind: partial(run, x) for kind, run in runs.items()}, n, warmup=1))
    for kind, network in networks.items():
        figures = ''.join(f'{t[kind]:10.2f}{t["float32"] / t[kind]:7.2f} x' for t in times)
        print(f'    {kind:30}{accuracy[kind]:>9}{network.megabytes:8.1f}{figures}', flush=True)


def digits(training: bool):
    """Images of the demo, prepared as for its held-out ones, and labels."""
    loader = demo._loader(demo.Digits(training), demo._setup(DEMO).image_size, training=False)
    images, labels = zip(*loader)
    return torch.cat(images), torch.cat(labels)


def trained(checkpoint: Path) -> torch.nn.Module:
    arguments = demo._model_args(demo._setup(DEMO))
    return reparameterize_model(timm.create_model(DEMO, checkpoint_path=str(checkpoint), **arguments).eval())


def quantize(args):
    installed = []
    for engine in args.engine:
        missing = [name for name in ENGINES[engine][1] if find_spec(name) is None]
        if missing:
            print(f'{engine} is skipped: {" and ".join(missing)} not installed')
        else:
            installed.append(engine)
    packages = dict.fromkeys(name for engine in installed for name in ENGINES[engine][1])
    print(machine(), *(f'{name} {version(name)}' for name in packages), sep=', ')
    with TemporaryDirectory() as folder:
        if args.checkpoint is None:
            demo.run(DEMO, None, 42, Path(folder))
        merged = trained(args.checkpoint or Path(folder, demo.FILES[0]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        calibration = digits(training=True)[0][:300]
        images, labels = digits(training=False)
        print(f'\nmerged {DEMO}, trained, on {len(images)} digits of {images.shape[2]}x{images.shape[3]}')
        for engine in installed:
            compare(engine, merged, calibration, images, labels, [51, 21])
        large = [engine for engine in installed if engine in args.large]
        if large:
            print('\nmerged smpconv_tiny, random weights, 224x224')
            merged = reparameterize_model(shaken('smpconv_tiny'))
            images = torch.randn(16, 3, 224, 224, generator=generator)
        for engine in large:
            compare(engine, merged, images[:8], images, torch.tensor([]), [11, 3])


def main():
    parser = argparse.ArgumentParser(prog='python -m benchmarks.quantize', description=__doc__.splitlines()[0])
    parser.add_argument(
        '--checkpoint', type=Path, metavar='FILE',
        help=f'the model.safetensors that `timm-smpconv demo --model {DEMO}` wrote; else the demo runs first')
    parser.add_argument('--engine', nargs='+', choices=ENGINES, default=list(ENGINES), help='default: all')
    parser.add_argument(
        '--large', nargs='*', choices=ENGINES, default=['openvino', 'onnxruntime'],
        help='of these, those that time smpconv_tiny, default: openvino onnxruntime; torchao compiles it for minutes')
    add_option(parser)
    args = parser.parse_args()
    with saving(args.save):
        quantize(args)


if __name__ == '__main__':
    main()
