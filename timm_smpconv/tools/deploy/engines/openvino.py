"""OpenVINO, and its int8 by NNCF."""
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Optional

import torch

from ..network import Network, Run, Source
from ..verify import hits
from .engine import Engine, missing, no_bfloat16, properties

LINES = '''\
import openvino

network = openvino.Core().read_model("$file")  # and its .bin
network.reshape([$shape])  # a fixed size is faster
network = openvino.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "$hint", "PERFORMANCE_HINT": "LATENCY"})
output = torch.from_numpy(network($input_name.numpy())[0])
'''
CPP = '''\
#include <openvino/openvino.hpp>
#include <algorithm>
#include <cstdio>

int main() {
  ov::Core core;
  auto model = core.read_model("$file");
  model->reshape(ov::PartialShape{$shape});
  auto network = core.compile_model(model, "CPU", {{"INFERENCE_PRECISION_HINT", "$hint"},
                                                   {"PERFORMANCE_HINT", "LATENCY"}});
  auto request = network.create_infer_request();
  ov::Tensor input = request.get_input_tensor();
  std::fill_n(input.data<$type>(), input.get_size(), $type(0));  // the pixels, channel by channel
  request.infer();
  ov::Tensor found = request.get_output_tensor(0);
  const float *output = found.data<float>();
  std::printf("%zu numbers, the largest is number %td\\n", found.get_size(),
              std::max_element(output, output + found.get_size()) - output);
}
'''


def hint(precision: str) -> str:
    return 'bf16' if precision == 'bfloat16' else 'f32'


def unsupported(network: Network, precision: str) -> Optional[str]:
    return missing('onnx', 'onnxscript', 'openvino', *(['nncf'] if precision == 'int8' else [])) or no_bfloat16(
        precision)


def write(source: Source, precision: str, file: Path) -> None:
    import openvino
    model = openvino.convert_model(source.onnx())  # after read_model, NNCF misses the weights of grouped convolutions
    if precision == 'int8':
        with redirect_stdout(sys.stderr):  # its progress
            model = _quantized(source, model)
    for key, value in properties(source.network).items():
        model.set_rt_info(value, ['timm_smpconv', key])
    openvino.save_model(model, file, compress_to_fp16=False)


def _quantized(source: Source, model: Any) -> Any:
    import nncf
    import openvino
    from nncf.quantization.advanced_parameters import OverflowFix
    assert source.calibration is not None
    calibration = nncf.Dataset([image.numpy() for image in source.calibration.split(1)])
    size = len(source.calibration)

    def score(compiled: Any, items: Any) -> Any:
        scores = [
            (hits((torch.from_numpy(compiled(x.numpy())[0]),), target, source.network.task) or 0.) / 100
            for x, target in items]
        return sum(scores) / len(scores), scores

    # 7-bit weights: sums of products with 8-bit ones overflow on CPUs without VNNI, to which the file may go.
    narrow = nncf.AdvancedQuantizationParameters(overflow_fix=OverflowFix.ENABLE)
    quantized = nncf.quantize(model, calibration, subset_size=size, advanced_parameters=narrow)
    if not source.validation:  # features have no classes
        return quantized
    before, after = (score(openvino.compile_model(m, 'CPU'), source.validation)[0] for m in (model, quantized))
    if 100 * (before - after) > source.max_drop:
        validation = nncf.Dataset(source.validation, lambda item: item[0].numpy())
        return nncf.quantize_with_accuracy_control(
            model, calibration, validation, score, max_drop=source.max_drop / 100, subset_size=size,
            advanced_quantization_parameters=narrow)
    return quantized


def load(network: Network, file: Path, precision: str, batch: int) -> Run:
    import openvino
    model = openvino.Core().read_model(file)
    model.reshape([batch, *network.input_size])
    request = openvino.compile_model(model, 'CPU', {
        'INFERENCE_PRECISION_HINT': hint(precision), 'PERFORMANCE_HINT': 'LATENCY',
        'INFERENCE_NUM_THREADS': torch.get_num_threads()}).create_infer_request()

    def run(x: torch.Tensor):
        found = request.infer({0: x.numpy()})
        return tuple(torch.from_numpy(found[output].copy()) for output in request.model_outputs)
    return run


def convolutions(file: Path) -> int:
    import openvino
    return sum('Convolution' in node.get_type_name() for node in openvino.Core().read_model(file).get_ops())


OPENVINO = Engine(
    'OpenVINO', '.xml', unsupported, write, load, LINES, CPP, fixes_batch=True, casts=True, convolutions=convolutions)
