"""Benchmark mode on a GPU, on CPU tensors that are said to be on one, with a timing function whose times tests set."""
import pytest
import torch
import torch.nn.functional as F
from conftest import TOLERANCE, compare, depthwise, difference
from torch._subclasses.fake_tensor import FakeTensorMode

from timm_smpconv import depthwise_conv2d
from timm_smpconv.ops import BACKENDS, use_backend
from timm_smpconv.ops.dispatch import kept, race
from timm_smpconv.ops.dispatch.geometry import PASSES


class Times:
    """Milliseconds of each backend, of which `fft` is the fastest, and what was timed."""

    def __init__(self):
        self.of, self.timed = {'native': 4., 'contiguous': 3., 'channels_last': 2., 'fft': 1.}, []


@pytest.fixture(autouse=True)
def times(monkeypatch):
    times = Times()

    def timing(candidates, **kwargs):
        times.timed.append(list(candidates))
        return {name: times.of[name] for name in candidates}

    monkeypatch.setattr(kept, 'timing', timing)
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    monkeypatch.setattr(race, 'is_on', lambda x: torch.backends.cudnn.benchmark)
    monkeypatch.setattr(race, '_kept', kept.Kept())
    race._shapes.clear()
    monkeypatch.setitem(BACKENDS, 'triton', BACKENDS['triton']._replace(unsupported=lambda x: 'not here'))
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False):
        yield times
    race._shapes.clear()


def tensors(b=2, h=14, dtype=torch.float32):
    return [t.to(dtype) for t in (torch.randn(b, 4, h, 11), torch.randn(4, 1, 9, 13) / 10, torch.randn(4))]


def check(inputs, function=depthwise_conv2d):
    compare(inputs, function, depthwise, TOLERANCE[inputs[0].dtype])


@pytest.mark.parametrize('winner', ['native', 'contiguous', 'channels_last', 'fft'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_the_fastest_computes_and_is_right(winner, dtype, times, calls):
    times.of[winner] = 0.5
    check(tensors(dtype=dtype))
    assert len(times.timed) == 3  # passes
    calls.clear()
    check(tensors(dtype=dtype))
    with torch.no_grad():
        depthwise_conv2d(*tensors(dtype=dtype))
    assert {name for name, _ in calls} <= {winner} and len(times.timed) == 3


def test_each_shape_is_timed_once_and_at_most_so_many(times, calls, monkeypatch):
    monkeypatch.setattr(race, 'MOST', 2)
    with torch.no_grad():
        for b in (1, 2, 2, 1, 3, 3):
            calls.clear()
            depthwise_conv2d(*tensors(b))
        assert calls == [('native', 'conv')] and len(times.timed) == 2
        x, weight, bias = tensors(1)
        depthwise_conv2d(x, weight[:, :, :7], bias)  # another case
    assert len(times.timed) == 3


def wrong(function):
    return lambda *args: 1.01 * function(*args)


def failing(function):
    def fail(*args):
        raise torch.OutOfMemoryError('CUDA out of memory')
    return fail


@pytest.mark.parametrize('what,part', [*zip(PASSES, ('conv', 'input_gradient', 'weight_gradient'))])
@pytest.mark.parametrize('fault', [wrong, failing, lambda function: lambda *args: function(*args) * torch.nan])
def test_a_backend_that_is_wrong_or_fails_does_not_win(what, part, fault, times, monkeypatch):
    monkeypatch.setitem(BACKENDS, 'fft', BACKENDS['fft']._replace(**{part: fault(getattr(BACKENDS['fft'], part))}))
    for _ in range(2):
        check(tensors())
    assert {g.what: name for g, (name, _) in race._kept._fastest.items()} == {
        pass_: 'channels_last' if pass_ == what else 'fft' for pass_ in PASSES}


@pytest.mark.parametrize('value', [0., float('nan'), float('inf')])
def test_a_result_that_judges_nothing_is_not_kept(value, times, calls):
    x, weight, _ = tensors()
    with torch.no_grad():
        depthwise_conv2d(torch.full_like(x, value), weight)
        assert not times.timed and set(calls) == {('native', 'conv')}
        depthwise_conv2d(x, weight)
    assert len(times.timed) == 1


def test_nothing_is_timed_during_capture(times, calls, monkeypatch):
    inputs = tensors()
    with torch.no_grad():
        depthwise_conv2d(*inputs)
        monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
        calls.clear()
        depthwise_conv2d(*inputs)  # known
        depthwise_conv2d(*tensors(5))
    assert calls == [('fft', 'conv'), ('native', 'conv')] and len(times.timed) == 1


def test_nothing_is_timed_where_a_backend_is_requested_or_values_are_fake(times):
    check(tensors(), lambda *inputs: depthwise_conv2d(*inputs, backend='channels_last'))
    with use_backend('native'):
        check(tensors())
    with FakeTensorMode() as mode, torch.no_grad():
        assert depthwise_conv2d(*(mode.from_tensor(t) for t in tensors())).shape == (2, 4, 14, 11)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False):
        check(tensors())
    check(tensors(), lambda *inputs: torch.jit.trace(depthwise_conv2d, inputs, check_trace=False)(*inputs))
    assert not times.timed


def test_compiled_code_times_when_it_runs(times):
    torch._dynamo.reset()
    traced = []

    def backend(graph, inputs):
        traced.append(len(times.timed))
        return graph.forward

    compiled = torch.compile(depthwise_conv2d, fullgraph=True, backend=backend)
    for _ in range(2):
        check(tensors(), compiled)
    torch._dynamo.reset()
    assert traced == [0] and len(times.timed) == 3


def test_vmap_is_right(times):
    x, weight, _ = tensors()
    y = torch.vmap(lambda image: depthwise_conv2d(image[None], weight))(x)
    assert difference(y[:, 0], F.conv2d(x.double(), weight.double(), padding=(4, 6), groups=4)) < 1e-5


def test_an_empty_batch_is_not_timed(times):
    y = depthwise_conv2d(*(t.requires_grad_() for t in tensors(0)))
    y.sum().backward()
    assert y.shape == (0, 4, 14, 11) and not times.timed


def test_deterministic_algorithms_are_never_timed():
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=True):
        assert not race._is_switched_on()
    assert race._is_switched_on()
    torch.use_deterministic_algorithms(True)
    try:
        assert not race._is_switched_on()
    finally:
        torch.use_deterministic_algorithms(False)
