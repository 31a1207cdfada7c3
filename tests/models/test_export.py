"""torch.export, TorchScript and ONNX, merged and unmerged, against eager PyTorch; ONNX Runtime runs the ONNX file."""
import io
import operator
from itertools import product

import onnx
import onnxruntime
import pytest
import timm
import torch
from conftest import FAMILIES, TOLERANCE, difference, shake_norms, small_model, wake_weights
from timm.utils import reparameterize_model

from timm_smpconv import depthwise_conv2d
from timm_smpconv.ops import dense

BATCH = torch.export.Dim('batch', min=1, max=64)


@pytest.fixture(params=[pytest.param('unmerged', marks=pytest.mark.slow), 'merged'])
def exportable(request):
    model = small_model(depths=(1, 1, 1, 1))
    return reparameterize_model(model) if request.param == 'merged' else model


def to_onnx(model, image, path):
    torch.onnx.export(
        model, (image,), str(path), input_names=['image'], output_names=['logits'], dynamo=True, external_data=False,
        dynamic_shapes={'x': {0: BATCH}})
    return onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])


def test_torch_export(exportable, images):
    program = torch.export.export(exportable, (images,), dynamic_shapes={'x': {0: BATCH}})
    targets = [n.target for n in program.graph.nodes if n.op == 'call_function']
    assert targets and all(t.namespace == 'aten' for t in targets if isinstance(t, torch._ops.OpOverload))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    again = torch.export.load(buffer).module()
    for x in (images, images[:1], torch.randn(5, 3, 64, 96)):
        assert difference(again(x), exportable(x)) < TOLERANCE[torch.float32]


MODES = tuple(product(FAMILIES, ('unmerged', 'merged'), (True, False), (True, False), (True, False)))
IN_DEFAULT_RUN = (
    ('images', 'merged', True, True, False), ('sequences', 'unmerged', True, True, True),
    ('CIFAR-10', 'unmerged', True, False, False))


@pytest.mark.parametrize('family,which,strict,grad,training', [
    pytest.param(*mode, marks=() if mode in IN_DEFAULT_RUN else pytest.mark.slow) for mode in MODES])
def test_torch_export_holds_standard_operators_in_every_mode(
        family, which, strict, grad, training, fastest, monkeypatch):
    """ExecuTorch, among others, knows no operator of this package; strict export goes through the compiler."""
    fastest('fft')  # where there is a choice, it is the operator
    monkeypatch.setattr(dense, 'choose_over_channels', lambda *args: 'fft')
    make, shape = FAMILIES[family]
    model = make().eval()
    if which == 'merged':
        model = reparameterize_model(model)
    model.train(training)
    x = torch.randn(shape)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (x,), dynamic_shapes={'x': {0: BATCH}}, strict=strict)
    calls = [n.target for n in program.graph.nodes if n.op == 'call_function']
    targets = [target for target in calls if target is not operator.getitem]
    assert targets and {getattr(target, 'namespace', target) for target in targets} == {'aten'}
    if not training:
        assert difference(program.module()(x[:1]), model(x[:1])) < TOLERANCE[torch.float32]


@pytest.mark.slow
def test_compiling_is_not_exporting(fastest):
    """A compiled training step keeps the operator, which chooses when it runs."""
    fastest('fft')
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    x, weight = torch.randn(1, 4, 12, 12, requires_grad=True), torch.randn(4, 1, 9, 9)
    torch._dynamo.reset()
    torch.compile(lambda x: depthwise_conv2d(x, weight), backend=backend)(x)
    (graph,) = graphs
    assert torch.ops.timm_smpconv.depthwise_conv2d in [
        getattr(n.target, 'overloadpacket', n.target) for n in graph.graph.nodes]


def test_torchscript_file(exportable, images):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(exportable), buffer)
    buffer.seek(0)
    again = torch.jit.load(buffer)
    for x in (images, torch.randn(1, 3, 33, 50)):
        assert difference(again(x), exportable(x)) < TOLERANCE[torch.float32]


@pytest.mark.slow
def test_onnx(exportable, images, tmp_path):
    session = to_onnx(exportable, images, tmp_path / 'm.onnx')
    graph = onnx.load(tmp_path / 'm.onnx')
    onnx.checker.check_model(graph)
    assert {o.domain: o.version for o in graph.opset_import}[''] >= 17
    assert {n.domain for n in graph.graph.node} <= {''} and not graph.functions
    for x in (images, images[:1], torch.randn(5, 3, 64, 96)):
        actual = torch.from_numpy(session.run(None, {'image': x.numpy()})[0])
        assert difference(actual, exportable(x)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    'name', [None, *(pytest.param(name, marks=pytest.mark.slow) for name in ('smpconv_tiny', 'smpconv_mobile51'))])
def test_onnx_of_the_merged_model(name, tmp_path):
    model = timm.create_model(name, num_classes=20) if name else small_model(depths=(1, 1, 1, 1))
    model = reparameterize_model(wake_weights(shake_norms(model)).eval())
    x = torch.randn(2, 3, 64, 64)
    session = to_onnx(model, x, tmp_path / 'm.onnx')
    assert {n.op_type for n in onnx.load(tmp_path / 'm.onnx').graph.node} <= {
        'Add', 'Conv', 'Div', 'Erf', 'Flatten', 'Gelu', 'Gemm', 'GlobalAveragePool', 'Mul', 'ReduceMean', 'Relu',
        'Reshape'}
    actual = torch.from_numpy(session.run(None, {'image': x[:1].numpy()})[0])
    assert difference(actual, model(x[:1])) < TOLERANCE[torch.float32]
