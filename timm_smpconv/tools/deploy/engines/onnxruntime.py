"""ONNX Runtime, and its int8: a graph with quantisers around its operators (QDQ)."""
from pathlib import Path
from typing import Optional

import torch

from ..network import Network, Run, Source
from .engine import Engine, missing, properties

LINES = '''\
import onnxruntime

session = onnxruntime.InferenceSession("$file", providers=["CPUExecutionProvider"])
output = torch.from_numpy(session.run(None, {"$input_name": $input_name.numpy()})[0])
'''
CPP = '''\
#include <onnxruntime_cxx_api.h>
#include <algorithm>
#include <cstdio>
#include <vector>

int main() {
  Ort::Env env;
  Ort::Session session(env, "$file", Ort::SessionOptions{});
  const std::vector<int64_t> shape{$shape};
  std::vector<$type> input($count);  // the pixels, channel by channel
  auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  auto tensor = Ort::Value::CreateTensor<$type>(memory, input.data(), input.size(), shape.data(), shape.size());
  const char *inputs[] = {"$input_name"}, *outputs[] = {"$output_name"};
  auto found = session.Run(Ort::RunOptions{}, inputs, &tensor, 1, outputs, 1);
  const float *output = found[0].GetTensorData<float>();
  const size_t size = found[0].GetTensorTypeAndShapeInfo().GetElementCount();
  std::printf("%zu numbers, the largest is number %td\\n", size, std::max_element(output, output + size) - output);
}
'''


def unsupported(network: Network, precision: str) -> Optional[str]:
    if precision == 'bfloat16':
        return 'it has no bfloat16 on CPUs'
    return missing('onnx', 'onnxscript', 'onnxruntime')


def write(source: Source, precision: str, file: Path) -> None:
    import onnx
    path = source.onnx()
    if precision == 'int8':
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

        assert source.calibration is not None
        images = iter(source.calibration.split(1))

        class Images(CalibrationDataReader):
            def get_next(self):
                image = next(images, None)
                return None if image is None else {source.network.input_name: image.numpy()}

        # Unsigned activations: signed ones are no faster than float32. 7-bit weights: see openvino.py.
        quantize_static(
            path, file, Images(), per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            reduce_range=True)
        path = file
    model = onnx.load(path)
    onnx.helper.set_model_props(model, properties(source.network))
    onnx.save(model, file)


def load(network: Network, file: Path, precision: str, batch: int) -> Run:
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=['CPUExecutionProvider'])

    def run(x: torch.Tensor):
        return tuple(map(torch.from_numpy, session.run(None, {network.input_name: x.numpy()})))
    return run


def convolutions(file: Path) -> int:
    import onnx
    return sum(node.op_type.startswith('Conv') for node in onnx.load(file).graph.node)


ONNXRUNTIME = Engine('ONNX Runtime', '.onnx', unsupported, write, load, LINES, CPP, convolutions=convolutions)
