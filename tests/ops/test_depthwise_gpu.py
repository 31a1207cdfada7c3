"""What only a GPU shows of the Triton programs: graphs, streams, synchronisation, memory.

Results at real sizes are in test_depthwise_triton.py.
"""
import pytest
import torch
from conftest import TOLERANCE, difference, exact_results, with_gradients

from timm_smpconv import depthwise_conv2d
from timm_smpconv.ops import use_backend

pytestmark = pytest.mark.gpu  # skipped where there is none, see conftest.py
DTYPE = torch.bfloat16


def tensors():
    x, cotangent = (torch.randn(16, 32, 28, 28, device='cuda').to(DTYPE) for _ in range(2))
    return x, torch.randn(32, 1, 29, 29, device='cuda').div(29).to(DTYPE), cotangent


def close(actual, expected):
    return all(difference(a.cpu(), e) < TOLERANCE[DTYPE] for a, e in zip(actual, expected))


def test_a_graph_replays_with_new_inputs():
    inputs = tensors()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with use_backend('triton'), torch.cuda.stream(side):
        with_gradients(depthwise_conv2d, *inputs)  # compiles the programs
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with use_backend('triton'), torch.cuda.graph(graph):
        outputs = with_gradients(depthwise_conv2d, *inputs)
    for _ in range(2):
        for held, new in zip(inputs, tensors()):
            held.copy_(new)
        graph.replay()
        assert close(outputs, exact_results(*inputs))


def test_a_side_stream_is_kept():
    inputs = tensors()
    late = [torch.zeros_like(t) for t in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with use_backend('triton'), torch.cuda.stream(side):
        with_gradients(depthwise_conv2d, *inputs)
        torch.cuda._sleep(100_000_000)
        for held, new in zip(late, inputs):
            held.copy_(new)
        outputs = with_gradients(depthwise_conv2d, *late)
    torch.cuda.current_stream().wait_stream(side)
    assert close(outputs, exact_results(*inputs))


def test_nothing_waits_for_the_gpu():
    inputs = tensors()
    with use_backend('triton'):
        with_gradients(depthwise_conv2d, *inputs)
        torch.cuda.set_sync_debug_mode('error')
        try:
            with_gradients(depthwise_conv2d, *inputs)
        finally:
            torch.cuda.set_sync_debug_mode('default')


def test_out_of_memory_leaves_the_process_usable():
    inputs = tensors()
    free = torch.cuda.mem_get_info()[0]
    weight = torch.randn(4096, 1, 111, 111, device='cuda', dtype=DTYPE)
    x = torch.empty(2, 4096, 111, 111, device='cuda', dtype=DTYPE)  # slabs of 15 GB
    held = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction(min(1., (held + 2 ** 30) / (held + free)))
    try:
        with use_backend('triton'), pytest.raises(torch.cuda.OutOfMemoryError):
            depthwise_conv2d(x, weight)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.)
    del x, weight
    with use_backend('triton'):
        assert close(with_gradients(depthwise_conv2d, *inputs), exact_results(*inputs))


def test_memory_is_given_back():
    inputs = tensors()
    with use_backend('triton'):
        with_gradients(depthwise_conv2d, *inputs)
        before = torch.cuda.memory_allocated()
        with_gradients(depthwise_conv2d, *inputs)
    assert torch.cuda.memory_allocated() == before


def test_tensors_on_two_devices_are_refused():
    x, weight, _ = tensors()
    with use_backend('triton'), pytest.raises(ValueError, match='weight must be on the device of x, cuda:0, got cpu'):
        depthwise_conv2d(x, weight.cpu())
