"""`depthwise_conv2d` where its backends race, as on CUDA: on CPU tensors, with a clock whose times the tests set."""
import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU_BACKENDS, LAYOUTS, TOLERANCE, deterministic, difference

from timm_smpconv import depthwise_conv2d
from timm_smpconv.ops import BACKENDS, choice, race, use_backend
from timm_smpconv.ops.choice import PASSES

PARTS = ('conv', 'input_gradient', 'corr')  # of a backend, one for each pass


class FakeClock:
    """Runs a candidate and returns the time set for its backend."""

    def __init__(self):
        self.times, self.timed = {}, []

    def time(self, run):
        run()
        backend, = run.args
        name = next(name for name, raced in choice.RACED.items() if raced is backend)
        self.timed.append(name)
        return self.times[name]


@pytest.fixture(autouse=True)
def clock(monkeypatch, fastest):
    """A device that is said to be CUDA, and backends of the CPU that race there."""
    clock = FakeClock()
    clock.times = {name: 4. - i for i, name in enumerate(CPU_BACKENDS)}  # 'fft' wins
    monkeypatch.setattr(race, 'clock', clock)
    monkeypatch.setattr(race, '_is_on_cuda', lambda x: True)
    monkeypatch.setattr(choice, 'RACED', {name: BACKENDS[name] for name in CPU_BACKENDS})
    fastest('fft')  # by the costs on the CPU, which have no say where backends race
    race.forget()
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False):
        yield clock
    race.forget()


def add(monkeypatch, clock, name, time, **parts):
    """A backend that races too: 'native' but for the given parts."""
    monkeypatch.setitem(choice.RACED, name, BACKENDS['native']._replace(**parts))
    clock.times[name] = time


def winners():
    return {record.case.what: record.winner for record in race.remembered()}


def tensors(layout='contiguous', b=2, dtype=torch.float32):
    x, weight = torch.randn(b, 4, 14, 11), torch.randn(4, 1, 9, 13) / 10
    return [LAYOUTS[layout](x).to(dtype), weight.to(dtype), torch.randn(4).to(dtype)]


def compare(inputs, function=depthwise_conv2d):
    """Output and all gradients against F.conv2d in float64."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    y, expected = function(*leaves), F.conv2d(*wide, padding=(4, 6), groups=4)
    cotangent = torch.randn_like(y)
    grads = torch.autograd.grad(y, leaves, cotangent)
    tolerance = TOLERANCE[y.dtype]
    assert difference(y, expected) < tolerance
    assert y.stride() == inputs[0].stride() and y.dtype == inputs[0].dtype
    for actual, wanted, leaf in zip(grads, torch.autograd.grad(expected, wide, cotangent.double()), leaves):
        assert actual.dtype == leaf.dtype
        assert difference(actual, wanted) < 2 * tolerance


@pytest.mark.parametrize('winner', CPU_BACKENDS)
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_every_call_is_right(winner, layout, dtype, clock):
    clock.times[winner] = 0.5
    for b in (2, 2, 2, 3):
        compare(tensors(layout, b, dtype))
    records = race.remembered()
    assert {(record.case.what, record.bucket[0], record.winner) for record in records} == {
        (what, b, winner) for b in (2, 3) for what in PASSES}
    assert len(records) == 2 * len(PASSES)
    assert all(not record.dropped and set(record.times) == set(CPU_BACKENDS) for record in records)
    assert all((record.case.c, record.case.k, record.case.l) == (4, 9, 13) for record in records)


def test_later_calls_run_the_winner_alone(clock, monkeypatch):
    calls = []

    def recording(label, function):
        return lambda *args: calls.append(label) or function(*args)

    for name, backend in choice.RACED.items():
        monkeypatch.setitem(choice.RACED, name, backend._replace(
            **{part: recording((name, part), getattr(backend, part)) for part in PARTS}))
    inputs = tensors()
    compare(inputs)
    assert set(calls) == set(itertools.product(CPU_BACKENDS, PARTS))
    timed = len(clock.timed)
    calls.clear()
    compare(inputs)
    with torch.no_grad():
        depthwise_conv2d(*inputs)
    assert calls == [('fft', 'conv'), ('fft', 'input_gradient'), ('fft', 'corr'), ('fft', 'conv')]
    assert len(clock.timed) == timed


@pytest.mark.parametrize('context', [torch.no_grad, torch.inference_mode])
def test_inference_races(context, clock):
    inputs = tensors('channels_last')
    for _ in range(2):
        with context():
            y = depthwise_conv2d(*inputs)
        assert difference(y, F.conv2d(*(t.double() for t in inputs), padding=(4, 6), groups=4)) < 1e-5
        assert y.stride() == inputs[0].stride()
    assert winners() == {'output': 'fft'}


def wrong(function):
    return lambda *args: 1.01 * function(*args)


def failing(error):
    def fail(*args):
        raise error
    return fail


@pytest.mark.parametrize('what,part', [*zip(PASSES, PARTS)])
@pytest.mark.parametrize('fault,reason', [
    (wrong, 'off by'),
    (lambda function: lambda *args: function(*args) * torch.nan, 'off by nan'),
    (lambda function: lambda *args: function(*args)[:1], 'shape'),
    (lambda function: failing(RuntimeError('no such tile')), 'RuntimeError: no such tile'),
    (lambda function: failing(torch.OutOfMemoryError('CUDA out of memory')), 'OutOfMemoryError'),
])
def test_a_bad_backend_is_dropped_for_its_pass(what, part, fault, reason, clock, monkeypatch):
    add(monkeypatch, clock, 'bad', 0.5, **{part: fault(getattr(BACKENDS['native'], part))})
    for _ in range(3):
        compare(tensors())
    assert winners() == {pass_: 'fft' if pass_ == what else 'bad' for pass_ in PASSES}
    for record in race.remembered():
        assert (list(record.dropped) == ['bad']) == (record.case.what == what)
        assert reason in record.dropped.get('bad', reason)


@pytest.mark.parametrize('dtype,precision,error,is_dropped', [
    (torch.float32, 'ieee', 1e-3, True), (torch.float32, 'ieee', 1e-5, False),
    (torch.float32, 'tf32', 1e-3, False), (torch.float32, 'tf32', 1e-2, True),
    (torch.float64, 'tf32', 1e-8, True), (torch.bfloat16, 'ieee', 1e-2, False), (torch.bfloat16, 'ieee', 1e-1, True)])
def test_errors_are_judged_by_the_precision_asked_for(dtype, precision, error, is_dropped, clock, monkeypatch):
    native = BACKENDS['native'].conv
    add(monkeypatch, clock, 'close', 0.5, conv=lambda *args: ((1 + error) * native(*args).double()).to(dtype))
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = precision
    try:
        with torch.no_grad():
            depthwise_conv2d(*tensors(dtype=dtype))
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    record, = race.remembered()
    assert ('close' in record.dropped) is is_dropped
    assert record.winner == ('fft' if is_dropped else 'close')


def test_a_winner_that_fails_later_gives_way(clock, monkeypatch):
    calls = []

    def conv(*args):
        calls.append(None)
        if len(calls) > 1 + race.ROUNDS:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return BACKENDS['native'].conv(*args)

    add(monkeypatch, clock, 'bad', 0.5, conv=conv)
    for _ in range(3):
        compare(tensors())
    assert winners() == {'output': 'native', 'input gradient': 'bad', 'weight gradient': 'bad'}
    assert len(calls) == 2 + race.ROUNDS


def test_a_backend_that_does_not_support_the_input_does_not_race(clock, monkeypatch):
    add(monkeypatch, clock, 'absent', 0.5, unsupported=lambda x: 'not installed', conv=pytest.fail)
    compare(tensors())
    assert 'absent' not in clock.timed
    assert set(winners().values()) == {'fft'}


@pytest.mark.parametrize('context', [
    deterministic,
    lambda: torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=True),
    lambda: torch.backends.cudnn.flags(enabled=True, benchmark=False),
    *(lambda name=name: use_backend(name) for name in CPU_BACKENDS),
], ids=['deterministic', 'cudnn deterministic', 'benchmark off', *CPU_BACKENDS])
def test_nothing_races_where_it_may_not(context, clock):
    with context():
        compare(tensors())
    compare(tensors(), lambda *inputs: depthwise_conv2d(*inputs, backend='channels_last'))
    assert not clock.timed and not race.remembered()


@pytest.mark.parametrize('transform', ['vmap', 'grad', 'twice'])
def test_derivatives_of_all_kinds_are_right(transform, clock):
    """Where something has to see the operators nothing races; what a race has found before is not used there."""
    x, weight, _ = tensors()
    compare(tensors())
    timed = len(clock.timed)

    def plain(x, weight):
        return F.conv2d(x, weight, padding=(4, 6), groups=4)

    def call(f, x, weight):
        if transform == 'vmap':
            return torch.vmap(lambda image: f(image[None], weight))(x)
        if transform == 'grad':
            return torch.func.grad(lambda w: f(x, w).square().sum())(weight)
        leaf = weight.clone().requires_grad_()
        grad, = torch.autograd.grad(f(x, leaf).pow(3).sum(), leaf, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaf)[0]

    assert difference(call(depthwise_conv2d, x, weight), call(plain, x.double(), weight.double())) < 5e-5
    assert len(clock.timed) == timed or transform == 'twice'


def test_compiled_code_races_when_it_runs(clock):
    """Not when it is traced: a compiler's tensors have no values."""
    torch._dynamo.reset()
    traced = []

    def backend(graph, inputs):
        traced.append(len(clock.timed))
        return graph.forward

    compiled = torch.compile(depthwise_conv2d, fullgraph=True, backend=backend)
    for _ in range(2):
        compare(tensors(), compiled)
    torch._dynamo.reset()
    assert traced == [0]
    assert winners() == dict.fromkeys(PASSES, 'fft')


def test_autocast_races_in_its_dtype(clock):
    inputs = tensors()
    with torch.autocast('cpu', dtype=torch.bfloat16), torch.no_grad():
        y = depthwise_conv2d(*inputs)
    assert y.dtype == torch.bfloat16
    record, = race.remembered()
    assert record.case.dtype == torch.bfloat16 and record.winner == 'fft'


def test_an_empty_batch_does_not_race(clock):
    x, weight, bias = tensors(b=0)
    y = depthwise_conv2d(x, weight.requires_grad_(), bias)
    y.sum().backward()
    assert y.shape == x.shape and not weight.grad.any()
    assert not clock.timed
