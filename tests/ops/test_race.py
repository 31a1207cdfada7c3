"""The race of backends, on CPU tensors with a clock whose times the tests set."""
import logging
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU_BACKENDS, TOLERANCE, difference
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from timm_smpconv.ops import BACKENDS, race
from timm_smpconv.ops.backends import native

EXACT = TOLERANCE[torch.float32]


class Run:
    """A candidate: what it returns is computed by a function of nothing, and its calls are counted."""

    def __init__(self, name, function):
        self.name, self.function, self.calls = name, function, 0

    def __call__(self):
        self.calls += 1
        return self.function()


class FakeClock:
    """Runs a candidate and returns the time set for its name, or the next one of a list."""

    def __init__(self):
        self.times, self.timed = {}, []

    def time(self, run):
        run()
        self.timed.append(run.name)
        time = self.times[run.name]
        return time.pop(0) if isinstance(time, list) else time


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr(race, 'clock', clock)
    race.forget()
    yield clock
    race.forget()


@pytest.fixture
def device(monkeypatch):
    """A CUDA device as far as the race asks for it: what is being captured, and calls of `empty_cache`."""
    class Device:
        capturing, emptied, on_empty = False, 0, staticmethod(lambda: None)

        def empty_cache(self):
            assert not self.capturing
            self.emptied += 1
            self.on_empty()

    device = Device()
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: device.capturing)
    monkeypatch.setattr(torch.cuda, 'empty_cache', device.empty_cache)
    return device


def key(b=2, h=5, w=7, c=3, k=31, l=29, dtype=torch.float32, what='output'):
    return race.make_key(what, torch.empty(b, c, h, w, dtype=dtype), k, l)


def lineup(**functions):
    return {name: Run(name, function) for name, function in functions.items()}


def returns(result):
    return result.clone


def raises(error):
    def fail():
        raise error
    return fail


def around(result):
    """Three candidates whose results differ by less than the tolerance, so that one can tell them apart."""
    return {'native': returns(result), 'a': returns(result * (1 + 2e-6)), 'b': returns(result * (1 + 4e-6))}


def winners():
    return [record.winner for record in race.remembered()]


def dropped():
    return race.remembered()[0].dropped


@pytest.mark.parametrize('times, winner', [
    ((3, 2, 1), 'b'), ((3, 1, 2), 'a'), ((1, 2, 3), 'native'), ((1, 0.98, 1), 'native'), ((1, 0.98, 0.96), 'b'),
])
def test_the_fastest_wins(times, winner, clock):
    expected = torch.randn(2, 3, 5, 7)
    results = {name: function() for name, function in around(expected).items()}
    runs = lineup(**around(expected))
    clock.times = dict(zip(runs, times))
    assert torch.equal(race.compute(key(), runs, EXACT), expected)  # the reference's, whoever wins
    before = {name: run.calls for name, run in runs.items()}
    for _ in range(3):
        assert torch.equal(race.compute(key(), runs, EXACT), results[winner])
    assert {name: run.calls - before[name] for name, run in runs.items()} == {
        name: 3 * (name == winner) for name in runs}
    assert winners() == [winner]
    assert race.remembered()[0].times == clock.times


def test_candidates_take_turns_and_the_median_counts(clock):
    clock.times = {'native': [1.4, 9, 1.4], 'a': [0.5, 5, 5], 'b': [1, 1, 9], 'c': [99, 0, 0]}
    result = torch.randn(2, 3, 5, 7)
    race.compute(key(), lineup(**around(result), c=returns(result)), EXACT)
    assert clock.timed == ['native', 'a', 'b', 'c', 'native', 'a', 'b', 'native', 'a', 'b']
    assert race.remembered()[0].times == {'native': 1.4, 'a': 5, 'b': 1, 'c': 99}
    assert winners() == ['b']


def test_a_much_slower_reference_is_not_timed_again(clock):
    clock.times = {'native': 9, 'a': 1, 'b': 5}
    race.compute(key(), lineup(**around(torch.randn(2, 3, 5, 7))), EXACT)
    assert clock.timed == ['native', 'a', 'b']
    assert winners() == ['a']


def last_entry(value):
    def change(result):
        result[-1, -1, -1, -1] = value
        return result
    return change


@pytest.mark.parametrize('change, reason', [
    (lambda result: result * 1.001, 'off by'),
    (last_entry(9), 'off by'),
    (last_entry(torch.nan), 'off by nan'),
    (last_entry(torch.inf), 'off by inf'),
    (lambda result: result.narrow(2, 0, 4), 'shape'),
    (lambda result: result.narrow(1, 0, 1), 'shape'),  # it could be broadcast
    (lambda result: result.double(), 'dtype'),
    (lambda result: result.to('meta'), 'device meta'),
    (lambda result: None, 'AttributeError'),
])
@pytest.mark.parametrize('piece', [2 ** 24, 210, 1])
def test_a_wrong_candidate_never_wins(change, reason, piece, clock, monkeypatch, caplog):
    monkeypatch.setattr(race, '_PIECE', piece)  # elements that are compared at a time
    expected = torch.randn(5, 3, 5, 7)
    runs = lineup(native=returns(expected), wrong=lambda: change(expected.clone()), right=returns(expected))
    clock.times = {'native': 3, 'wrong': 1, 'right': 2}
    with caplog.at_level(logging.INFO, race.__name__):
        for _ in range(3):
            assert torch.equal(race.compute(key(5), runs, EXACT), expected)
    assert winners() == ['right']
    assert runs['wrong'].calls == 1
    assert list(dropped()) == ['wrong']
    assert reason in dropped()['wrong']
    line, = (line for line in caplog.records if 'dropped' in line.message)
    assert line.levelno == (logging.INFO if reason == 'AttributeError' else logging.WARNING)
    for part in ('wrong', 'output of 5 × 3 × 5 × 7, kernel 31 × 29', reason):
        assert part in line.message


@pytest.mark.parametrize('scale', [1e-6, 1, 1e6])
@pytest.mark.parametrize('error, winner', [(5e-6, 'a'), (2e-5, 'native')])
def test_errors_are_relative_to_the_largest_value(scale, error, winner, clock):
    expected = torch.rand(2, 3, 5, 7)
    expected[0, 0, 0, 0] = 2
    other = expected.clone()
    other[1, 1, 1, 1] += 2 * error
    clock.times = {'native': 2, 'a': 1}
    race.compute(key(), lineup(native=returns(scale * expected), a=returns(scale * other)), EXACT)
    assert winners() == [winner]


@pytest.mark.parametrize('error', [
    RuntimeError('no such tile\nand so on'), torch.OutOfMemoryError('CUDA out of memory'), KeyError(), ImportError('x'),
])
@pytest.mark.parametrize('fails_at', [1, 2, 3])
def test_a_failing_candidate_is_dropped(error, fails_at, clock, caplog):
    expected = torch.randn(2, 3, 5, 7)

    def fail():
        if runs['bad'].calls == fails_at:
            raise error
        return expected.clone()

    runs = lineup(native=returns(expected), bad=fail, good=returns(expected))
    clock.times = {'native': 3, 'bad': 1, 'good': 2}
    with caplog.at_level(logging.INFO, race.__name__):
        for _ in range(3):
            assert torch.equal(race.compute(key(), runs, EXACT), expected)
    assert winners() == ['good']
    assert runs['bad'].calls == fails_at
    assert dropped() == {'bad': f'{type(error).__name__}: {(error.args or [""])[0].split(chr(10))[0]}'}
    line, = (line for line in caplog.records if 'dropped' in line.message)
    assert 'bad' in line.message
    assert 'output of 2 × 3 × 5 × 7' in line.message


@pytest.mark.parametrize('fails_late', [False, True])
def test_memory_is_given_back_after_running_out_of_it(fails_late, clock, device):
    expected, taken = torch.randn(2, 3, 5, 7), []

    def exhaust():
        workspace = torch.empty(1000)
        if fails_late and not taken and runs['bad'].calls <= 1 + race.ROUNDS:
            return expected.clone()
        taken.append(weakref.ref(workspace))
        raise torch.OutOfMemoryError('CUDA out of memory')

    freed = []
    device.on_empty = lambda: freed.extend(ref() is None for ref in taken)
    runs = lineup(native=returns(expected), bad=exhaust)
    clock.times = {'native': 2, 'bad': 1}
    race.compute(key(), runs, EXACT)
    if fails_late:
        assert winners() == ['bad']
        freed.clear()
        race.compute(key(), runs, EXACT)
        assert freed == [True]
    else:  # before the next candidate, and at the end as after every race
        assert freed == [True, True]
    assert winners() == ['native']


def test_a_winner_that_fails_later_is_forgotten_for_good(clock, caplog):
    expected = torch.randn(2, 3, 5, 7)
    runs = lineup(**around(expected))
    clock.times = {'native': 3, 'a': 2, 'b': 1}
    race.compute(key(), runs, EXACT)
    race.compute(key(b=6), runs, EXACT)
    runs['b'].function = raises(torch.OutOfMemoryError('CUDA out of memory'))
    before = runs['b'].calls
    for _ in range(3):
        assert torch.equal(race.compute(key(), runs, EXACT), expected)
    assert runs['b'].calls == before + 1
    assert winners() == ['native', 'b']  # for this key, not for the other
    assert dropped() == {'b': 'OutOfMemoryError: CUDA out of memory'}
    line, = caplog.records
    assert line.levelno == logging.WARNING
    assert 'backend b is dropped for the output of 2 × 3 × 5 × 7' in line.message


@pytest.mark.parametrize('value', [torch.nan, torch.inf, 0])
def test_results_that_judge_nothing_are_not_remembered(value, clock, device):
    """Zero: a wrong candidate would be right."""
    x, kernel = torch.randn(2, 3, 5, 7), torch.randn(3, 1, 3, 3)

    def native():
        return F.conv2d(x, kernel, padding=1, groups=3)

    runs = lineup(native=native, wrong=lambda: native() * 2, right=native)
    clock.times = {'native': 3, 'wrong': 1, 'right': 2}
    good = x.clone()
    x[:] = 0
    x[1, 1, 1, 1] = value
    torch.testing.assert_close(race.compute(key(), runs, EXACT), native(), equal_nan=True, rtol=0, atol=0)
    assert not race.remembered()
    assert runs['wrong'].calls == runs['right'].calls == device.emptied == 0
    x.copy_(good)
    race.compute(key(), runs, EXACT)
    assert winners() == ['right']
    assert device.emptied == 1


def test_half_precision_is_not_judged_by_subnormal_numbers(clock):
    """A difference of one unit there is larger than the tolerance."""
    tiny, large = torch.full((2, 3, 5, 7), 6e-7).half(), torch.full((2, 3, 5, 7), 1e-3).half()
    clock.times = {'native': 2, 'a': 1}
    runs = lineup(native=returns(tiny), a=returns(tiny.nextafter(torch.ones(1).half())))
    race.compute(key(dtype=torch.float16), runs, TOLERANCE[torch.float16])
    assert not race.remembered()
    runs = lineup(native=returns(large), a=returns(large.nextafter(torch.ones(1).half())))
    race.compute(key(dtype=torch.float16), runs, TOLERANCE[torch.float16])
    assert winners() == ['a']


def test_results_that_never_can_be_judged_are_looked_at_ever_less(clock, monkeypatch):
    looks, aminmax = [], torch.aminmax
    monkeypatch.setattr(torch, 'aminmax', lambda t: looks.append(None) or aminmax(t))
    runs = lineup(**around(torch.zeros(2, 3, 5, 7)))
    for _ in range(1000):
        race.compute(key(), runs, EXACT)
    assert runs['native'].calls == 1000
    assert len(looks) == 10  # 1, 2, 4 … 512


@pytest.mark.parametrize('fails_at', [2, 3])
def test_a_reference_that_cannot_be_timed_stays(fails_at, clock, caplog):
    """As where memory holds one result only."""
    expected = torch.randn(2, 3, 5, 7)

    def native():
        if runs['native'].calls == fails_at:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return expected.clone()

    runs = lineup(native=native, a=returns(expected))
    clock.times = {'native': 2, 'a': 1}
    with caplog.at_level(logging.INFO, race.__name__):
        assert torch.equal(race.compute(key(), runs, EXACT), expected)
    assert winners() == ['native']
    assert 'could not be timed: OutOfMemoryError' in caplog.text


@pytest.mark.parametrize('error', [ValueError('x is wrong'), KeyboardInterrupt()])
@pytest.mark.parametrize('name', ['native', 'a'])
def test_errors_of_the_reference_and_interrupts_reach_the_caller(error, name, clock):
    expected = torch.randn(2, 3, 5, 7)
    runs = lineup(**around(expected))
    clock.times = {'native': 3, 'a': 1, 'b': 2}
    function, runs[name].function = runs[name].function, raises(error)
    if name == 'native' or isinstance(error, KeyboardInterrupt):
        with pytest.raises(type(error)) as caught:
            race.compute(key(), runs, EXACT)
        assert caught.value is error
        assert not race.remembered()
    runs[name].function = function
    race.compute(key(), runs, EXACT)
    race.compute(key(), runs, EXACT)
    assert winners() == ['a']  # the failed call has left nothing behind, no lock either


def test_nothing_is_timed_during_capture(clock, device):
    expected = torch.randn(2, 3, 5, 7)
    runs = lineup(**around(expected))
    clock.times = {'native': 3, 'a': 1, 'b': 2}
    device.capturing = True
    for _ in range(2):
        assert torch.equal(race.compute(key(), runs, EXACT), expected)
    assert [run.calls for run in runs.values()] == [2, 0, 0]
    assert not race.remembered()
    device.capturing = False
    race.compute(key(), runs, EXACT)
    assert winners() == ['a']


def test_a_capture_runs_the_winner_only_at_sizes_where_it_has_run(clock, device):
    expected = torch.randn(2, 3, 5, 7)
    runs = lineup(**around(expected))
    winner = runs['a'].function()
    clock.times = {'native': 3, 'a': 1, 'b': 2}
    race.compute(key(h=5), runs, EXACT)
    assert key(h=5).bucket == key(h=6).bucket
    device.capturing = True
    assert torch.equal(race.compute(key(h=5), runs, EXACT), winner)
    assert torch.equal(race.compute(key(h=6), runs, EXACT), expected)
    device.capturing = False
    assert torch.equal(race.compute(key(h=6), runs, EXACT), winner)
    device.capturing = True
    assert torch.equal(race.compute(key(h=6), runs, EXACT), winner)
    runs['a'].function = raises(RuntimeError('no memory'))
    assert torch.equal(race.compute(key(h=6), runs, EXACT), expected)  # `empty_cache` would fail


class Subclass(torch.Tensor):
    pass


@contextmanager
def setting(owner, name, value):
    """As `monkeypatch.setattr`, which some of PyTorch's settings do not let through."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def deterministic_algorithms(warn_only):
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def batched_backward(ask):
    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            ask(grad)
            return grad

    x = torch.randn(1, 2, 3, 3, requires_grad=True)
    torch.autograd.grad(Probe.apply(x), x, torch.randn(4, 1, 2, 3, 3), is_grads_batched=True)


def in_transform(transform):
    return lambda ask: transform(lambda x: (ask(x), x.sum())[1])(torch.randn(1, 2, 3, 3))


def traced(ask):
    torch.jit.trace(lambda x: (ask(x), x + 1)[1], torch.randn(1, 2, 3, 3), check_trace=False)


def compiled(ask):
    answers = []
    torch.compile(lambda x: x + race.is_allowed(x), backend=lambda graph, inputs: answers.append(graph) or graph)(
        torch.zeros(1, 2, 3, 3))
    graph, = answers
    added, = (node.args[1] for node in graph.graph.nodes if node.op == 'call_function')
    ask(added)


def where(context):
    def call(ask):
        with context():
            ask(torch.randn(1, 2, 3, 3))
    return call


SITUATIONS = {
    'plain': (True, where(nullcontext)),
    'parameter': (True, lambda ask: ask(torch.nn.Parameter(torch.randn(1, 2, 3, 3)))),
    'no_grad': (True, where(torch.no_grad)),
    'inference mode': (True, where(torch.inference_mode)),
    'benchmark off': (False, where(lambda: setting(torch.backends.cudnn, 'benchmark', False))),
    'cudnn deterministic': (False, where(lambda: setting(torch.backends.cudnn, 'deterministic', True))),
    'deterministic': (False, where(lambda: deterministic_algorithms(False))),
    'deterministic, warnings': (False, where(lambda: deterministic_algorithms(True))),
    'on the CPU': (False, where(lambda: setting(race, '_is_on_cuda', lambda x: x.is_cuda))),
    'fake mode': (False, where(FakeTensorMode)),
    'fake': (False, lambda ask: ask(FakeTensorMode().from_tensor(torch.randn(1, 2, 3, 3)))),
    'subclass': (False, lambda ask: ask(torch.randn(1, 2, 3, 3).as_subclass(Subclass))),
    'dispatch mode': (False, where(lambda: FlopCounterMode(display=False))),
    'vmap': (False, in_transform(torch.vmap)),
    'grad': (False, in_transform(torch.func.grad)),
    'batched backward': (False, batched_backward),
    'tracing': (False, traced),
    'compiling': (False, compiled),
}


@pytest.mark.parametrize('situation', SITUATIONS)
def test_where_a_race_is_allowed(situation, monkeypatch):
    monkeypatch.setattr(race, '_is_on_cuda', lambda x: True)
    allowed, call = SITUATIONS[situation]
    answers = []
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False):
        call(lambda x: answers.append(race.is_allowed(x) if isinstance(x, torch.Tensor) else x))
    assert answers == [allowed]


def test_sizes_share_a_race_in_buckets():
    buckets = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    for n in range(1, 257):
        b = next(bucket for bucket in buckets if bucket >= n)
        case = race.make_key('output', torch.empty(1, 3, 5, 7), 31, 29).case
        assert race.Key(case, (n, 1, 2)).bucket == (b, 1, 2)
        assert race.Key(case, (1, n, 2)).bucket == (1, b, 2)
        assert race.Key(case, (2, 1, n)).bucket == (2, 1, b)


def test_varying_sizes_do_not_race_for_ever(clock):
    expected, generator = torch.randn(2, 3, 5, 7), torch.Generator().manual_seed(0)
    runs = lineup(**around(expected))
    clock.times = {'native': 3, 'a': 2, 'b': 1}
    for _ in range(300):
        b, h, w = torch.randint(1, 300, (3,), generator=generator).tolist()
        race.compute(key(b, h, w), runs, EXACT)
    races = len(clock.timed) // len(runs) // race.ROUNDS
    assert races == race.MAX_RACES
    assert clock.timed.count('native') == races * race.ROUNDS
    assert [record.neighbor is None for record in race.remembered()].count(True) == races
    race.compute(key(k=33), runs, EXACT)  # another kernel has its own count
    assert clock.timed.count('native') == (races + 1) * race.ROUNDS


def test_a_size_in_the_same_bucket_does_not_race(clock):
    runs = lineup(**around(torch.randn(2, 3, 5, 7)))
    clock.times = {'native': 3, 'a': 2, 'b': 1}
    for b, h, w in ((5, 56, 50), (6, 64, 64), (5, 49, 49)):
        race.compute(key(b, h, w), runs, EXACT)
    assert clock.timed.count('native') == race.ROUNDS
    race.compute(key(7, 64, 64), runs, EXACT)
    assert clock.timed.count('native') == 2 * race.ROUNDS


def test_late_sizes_take_the_winner_of_the_nearest_ones(clock, monkeypatch):
    monkeypatch.setattr(race, 'MAX_RACES', 2)
    expected = torch.randn(2, 3, 5, 7)
    runs = lineup(**around(expected))
    clock.times = {'native': 3, 'a': 1, 'b': 2}
    race.compute(key(1, 8, 8), runs, EXACT)
    clock.times = {'native': 3, 'a': 2, 'b': 1}
    race.compute(key(4, 64, 64), runs, EXACT)
    timed = len(clock.timed)
    # In octaves: (4, 24, 24) is 5.2 from the first and 2.8 from the second.
    for sizes, winner in (((2, 16, 16), 'a'), ((4, 32, 32), 'b'), ((4, 30, 32), 'b'), ((4, 24, 24), 'b'),
                          ((1, 24, 24), 'a'), ((4, 12, 256), 'b'), ((1, 256, 256), 'b'), ((256, 12, 12), 'a')):
        before = runs[winner].calls
        assert torch.equal(race.compute(key(*sizes), runs, EXACT), runs[winner].function())
        assert runs[winner].calls == before + 1
    assert len(clock.timed) == timed
    assert [record.neighbor for record in race.remembered()[2:4]] == [(1, 8, 8), (4, 64, 64)]


def test_late_sizes_are_not_forgotten_with_their_neighbor(clock, monkeypatch):
    """A winner that fails at one of them stays at the other."""
    monkeypatch.setattr(race, 'MAX_RACES', 1)
    expected = torch.randn(2, 3, 5, 7)
    runs = lineup(**around(expected))
    clock.times = {'native': 3, 'a': 1, 'b': 2}
    race.compute(key(4), runs, EXACT)
    function, runs['a'].function = runs['a'].function, raises(RuntimeError())
    assert torch.equal(race.compute(key(8), runs, EXACT), expected)
    runs['a'].function = function
    assert torch.equal(race.compute(key(8), runs, EXACT), expected)
    assert torch.equal(race.compute(key(4), runs, EXACT), function())


def keys():
    x = torch.empty(4, 8, 16, 24)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    make = race.make_key
    return {
        'base': make('output', x, 31, 29),
        'pass': make('input gradient', x, 31, 29),
        'dtype': make('output', x.half(), 31, 29),
        'other dtype': make('output', x.bfloat16(), 31, 29),
        'channels_last': make('output', channels_last, 31, 29),
        'strided': make('output', torch.empty(4, 8, 24, 16).mT, 31, 29),
        'channels': make('output', x[:, :7].contiguous(), 31, 29),
        'height of the kernel': make('output', x, 29, 29),
        'width of the kernel': make('output', x, 31, 31),
        'batch': make('output', x[:1], 31, 29),
        'height': make('output', x[:, :, :4].contiguous(), 31, 29),
        'width': make('output', x[..., :4].contiguous(), 31, 29),
        'gradient': make('weight gradient', x, 31, 29, x),
        'gradient in channels_last': make('weight gradient', x, 31, 29, channels_last),
    }


def test_what_a_winner_is_remembered_for(clock):
    """Two keys of everything that matters, and the same keys from other tensors."""
    expected = torch.randn(2, 3, 5, 7)
    runs = lineup(**around(expected))
    found = keys()
    assert len(set(found.values())) == len(found)
    for i, made in enumerate(found.values()):
        clock.times = {'native': 3, 'a': 1 + i % 2, 'b': 2 - i % 2}
        race.compute(made, runs, EXACT)
    found_winners = {(record.case, record.bucket): record.winner for record in race.remembered()}
    assert found_winners == {(made.case, made.bucket): 'ab'[i % 2] for i, made in enumerate(found.values())}
    timed = len(clock.timed)
    for i, made in enumerate(keys().values()):
        assert torch.equal(race.compute(made, runs, EXACT), runs['ab'[i % 2]].function())
    assert len(clock.timed) == timed


@pytest.mark.parametrize('owner, name, value', [
    (torch.backends.cudnn, 'enabled', False),
    (torch.backends.cudnn.conv, 'fp32_precision', 'ieee'),
    (torch.backends.cudnn, 'allow_tf32', False),
    (torch.backends.cuda.matmul, 'fp32_precision', 'tf32'),
    (torch.Tensor, 'get_device', lambda x: 1),
])
def test_settings_and_the_device_are_part_of_the_key(owner, name, value):
    before = key()
    with setting(owner, name, value):
        assert key() != before
    assert key() == before


@pytest.mark.parametrize('other', ['same key', 'other key'])
def test_no_thread_waits_for_another_that_races(other, clock):
    """The clock of the first thread stands still until the second thread has its result."""
    expected = torch.randn(2, 3, 5, 7)
    runs = lineup(**around(expected))
    clock.times = {'native': 3, 'a': 2, 'b': 1}
    racing, finished, time = threading.Event(), threading.Event(), clock.time

    def wait(run):
        racing.set()
        assert finished.wait(20)
        return time(run)

    clock.time = wait
    second = key() if other == 'same key' else key(b=9)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(race.compute, key(), runs, EXACT)
        assert racing.wait(20)
        before = {name: run.calls for name, run in runs.items()}
        try:
            for _ in range(2):
                assert torch.equal(race.compute(second, runs, EXACT), expected)
            assert {name: run.calls - before[name] for name, run in runs.items()} == {'native': 2, 'a': 0, 'b': 0}
        finally:
            finished.set()
        assert torch.equal(first.result(), expected)
    assert clock.timed.count('native') == race.ROUNDS
    assert winners() == ['b']
    race.compute(second, runs, EXACT)
    assert winners() == ['b'] * len({key(), second})


def test_a_race_that_ended_meanwhile_is_not_run_again(clock, monkeypatch):
    """A thread finds no winner, and another thread finishes its race before the first one can start its own."""
    expected = torch.randn(2, 3, 5, 7)
    runs = lineup(**around(expected))
    clock.times = {'native': 3, 'a': 2, 'b': 1}
    lock = race._racing

    class Late:
        release = staticmethod(lock.release)

        def acquire(self, blocking):
            monkeypatch.setattr(race, '_racing', lock)
            race.compute(key(), runs, EXACT)
            monkeypatch.setattr(race, '_racing', self)
            return lock.acquire(blocking=blocking)

    monkeypatch.setattr(race, '_racing', Late())
    assert torch.equal(race.compute(key(), runs, EXACT), runs['b'].function())
    assert clock.timed.count('native') == race.ROUNDS


def test_at_most_two_results_are_held(clock):
    expected, alive, most = torch.randn(2, 3, 5, 7), [], []

    def record():
        result = expected.clone()
        alive[:] = [ref for ref in alive if ref() is not None] + [weakref.ref(result)]
        most.append(len(alive))
        return result

    clock.times = {'native': 3, 'a': 2, 'b': 1}
    runs = lineup(native=record, a=record, b=record)
    race.compute(key(), runs, EXACT)
    assert len(most) == 1 + 2 + 3 * race.ROUNDS
    assert max(most) == 2


@pytest.mark.parametrize('names', [['native'], ['native', 'a']])
def test_a_reference_alone_does_not_race(names, clock):
    """From the start, or where every other candidate is dropped."""
    expected = torch.randn(2, 3, 5, 7)
    runs = lineup(native=returns(expected), a=raises(RuntimeError()))
    for _ in range(3):
        assert torch.equal(race.compute(key(), {name: runs[name] for name in names}, EXACT), expected)
    assert not clock.timed
    assert len(race.remembered()) == len(names) - 1  # others may come
    assert runs['native'].calls == 3
    assert runs['a'].calls == len(names) - 1


def test_a_winner_that_is_no_candidate_now_does_not_run(clock):
    expected = torch.randn(2, 3, 5, 7)
    runs = lineup(**around(expected))
    clock.times = {'native': 3, 'a': 2, 'b': 1}
    race.compute(key(), runs, EXACT)
    assert torch.equal(race.compute(key(), {name: runs[name] for name in ('native', 'a')}, EXACT), expected)
    assert torch.equal(race.compute(key(), runs, EXACT), runs['b'].function())


def test_what_is_remembered_can_be_read_and_forgotten(clock):
    expected = torch.randn(2, 3, 5, 7)
    runs = lineup(**around(expected), bad=raises(RuntimeError('no')))
    clock.times = {'native': 3, 'a': 2, 'b': 1}
    race.compute(key(b=5), runs, EXACT)
    record, = race.remembered()
    assert record == race.Record(
        key().case, (6, 6, 8), 'b', {'native': 3, 'a': 2, 'b': 1}, {'bad': 'RuntimeError: no'}, None)
    record.times.clear()
    record.dropped.clear()
    assert race.remembered()[0].times
    assert race.remembered()[0].dropped
    race.forget()
    assert not race.remembered()
    clock.times = {'native': 3, 'a': 1, 'b': 2}
    race.compute(key(b=5), runs, EXACT)
    assert winners() == ['a']


def test_the_device_of_the_input_is_the_current_one_in_a_race(clock, device, monkeypatch):
    """Events, streams and captures are those of the current device."""
    current, seen, time = [0], set(), clock.time

    @contextmanager
    def use(index):
        before, current[0] = current[0], index
        try:
            yield
        finally:
            current[0] = before

    monkeypatch.setattr(torch.cuda, 'device', use)
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: current[0] != 3)  # another is capturing
    clock.time = lambda run: seen.add(current[0]) or time(run)
    clock.times = {'native': 3, 'a': 2, 'b': 1}
    made = key()
    race.compute(made._replace(case=made.case._replace(device=3)), lineup(**around(torch.randn(2, 3, 5, 7))), EXACT)
    assert winners() == ['b']
    assert seen == {3}
    assert current == [0]


@pytest.mark.parametrize('ms', [0.01, 0.5, 2, 80])
def test_the_clock_times_the_work_with_its_launch(ms, monkeypatch):
    """On a device that works behind the program: 1 ms is still queued, each launch takes 0.2 ms of the program."""
    now, busy_until, calls = [0.], [1.], [0]

    class Stream:
        def synchronize(self):
            now[0] = max(now[0], busy_until[0])

    stream = Stream()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, on):
            assert on is stream
            self.at = max(now[0], busy_until[0])

        def synchronize(self):
            now[0] = max(now[0], self.at)
            self.waited = True

        def elapsed_time(self, end):
            assert end.waited
            return end.at - self.at

    def run():
        calls[0] += 1
        now[0] += 0.2
        busy_until[0] = max(now[0], busy_until[0]) + ms

    monkeypatch.setattr(torch.cuda, 'current_stream', lambda: stream)
    monkeypatch.setattr(torch.cuda, 'Event', Event)
    found = race.CudaClock().time(run)
    n = max(1, calls[0] - 1)  # in a row, after the first
    # The launches of the others run beside the work of the one before, or the work beside the launch of the next.
    assert found == pytest.approx(max(0.2 + n * ms, n * 0.2 + ms) / n)
    assert calls[0] <= 21
    assert now[0] < max(10, 2 * ms)
    assert (calls[0] == 1) == (ms > race.CudaClock.ENOUGH / 2)


def candidates(x, compute, wrong):
    """One of each backend of the CPU, whose results get the memory format of x, and one that is wrong."""
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    runs = {name: lambda b=BACKENDS[name]: compute(b).contiguous(memory_format=layout) for name in CPU_BACKENDS}
    return lineup(**runs, wrong=wrong)


class Racing(torch.autograd.Function):
    """A depthwise convolution whose three passes race."""

    @staticmethod
    def convolve(what, x, weight):
        runs = candidates(x, lambda b: b.conv(x, weight, None), lambda: native.conv(x, weight.flip(2, 3)))
        return race.compute(race.make_key(what, x, *weight.shape[2:]), runs, EXACT)

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return Racing.convolve('output', x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        k, l = weight.shape[2:]
        runs = candidates(x, lambda b: b.corr(grad, x, k, l), lambda: native.corr(x, grad, k, l))
        dw = race.compute(race.make_key('weight gradient', x, k, l, grad), runs, EXACT)
        return Racing.convolve('input gradient', grad, weight.flip(2, 3)), dw


@pytest.mark.parametrize('winner', CPU_BACKENDS)
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_gradients_are_right_on_every_call(winner, layout, clock):
    clock.times = dict.fromkeys(CPU_BACKENDS, 3) | {winner: 2, 'wrong': 1}
    for b in (2, 2, 2, 3, 3):
        x = torch.randn(b, 5, 9, 11).contiguous(memory_format=layout).requires_grad_()
        weight = torch.randn(5, 1, 7, 13, requires_grad=True)
        y = Racing.apply(x, weight)
        grad = torch.randn_like(y)
        y.backward(grad)
        inputs = [t.detach().double().requires_grad_() for t in (x, weight)]
        expected = F.conv2d(*inputs, padding=(3, 6), groups=5)
        expected.backward(grad.double())
        for actual, wanted in zip((y, x.grad, weight.grad), (expected, *(t.grad for t in inputs))):
            assert difference(actual, wanted) < EXACT
    assert winners() == [winner] * 6
    assert all('wrong' in record.dropped for record in race.remembered())
