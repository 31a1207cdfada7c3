"""The one function that times things, and the comparison before it, with a clock that the tests set."""
import logging

import pytest
import torch

from timm_smpconv.ops.dispatch import timing


class Clock:
    """Seconds that pass when a candidate runs: its next time, the last one for ever after."""

    def __init__(self, monkeypatch):
        self.now, self.ran = 0., []
        monkeypatch.setattr(timing, '_clock', lambda: self.now)

    def candidate(self, name, *seconds):
        def run():
            count = self.ran.count(name)
            self.ran.append(name)
            self.now += seconds[min(count, len(seconds) - 1)]
        return run

    def time(self, candidates, **kwargs):
        return timing.timing({name: self.candidate(name, *seconds) for name, seconds in candidates.items()}, **kwargs)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_candidates_take_turns_and_have_their_medians(clock):
    times = clock.time({'a': (9, .1, .3, .2), 'b': (9, 1)}, rounds=3, warmup=1, settle=False)
    assert times == pytest.approx({'a': 200, 'b': 1000})
    assert clock.ran == ['a', 'b'] + ['a', 'b'] * 3


def test_what_settles_is_not_timed(clock):
    assert clock.time({'a': (5, .1)}, rounds=1, warmup=0) == pytest.approx({'a': 100})
    assert clock.ran == ['a', 'a']


def test_a_warm_up_ends_after_a_fifth_of_a_second(clock):
    clock.time({'a': (.1,), 'b': (.01,)}, rounds=1, warmup=5, settle=False)
    assert clock.ran.count('a') == 2 + 1 and clock.ran.count('b') == 5 + 1


def test_slow_candidates_have_no_part_in_the_rounds(clock):
    times = clock.time({'a': (.9, .5), 'b': (.01,), 'c': (.03,)}, rounds=4, slow=3.01)
    assert times == pytest.approx({'a': 900, 'b': 10, 'c': 30})
    assert clock.ran.count('a') == 1 and clock.ran.count('c') == 2 + 2 * 4


def test_rounds_end_but_there_are_three(clock):
    clock.time({'a': (1.,)}, rounds=50, warmup=1, settle=False, seconds=10)
    assert len(clock.ran) == 1 + 11
    clock.ran.clear()
    clock.time({'a': (1.,)}, rounds=50, warmup=1, settle=False, seconds=0.5)
    assert len(clock.ran) == 1 + 3


def test_nothing_to_time(clock):
    assert clock.time({}, slow=3) == {}


def test_candidates_that_fail_or_differ_are_left_out(caplog):
    expected = torch.randn(2, 3)

    def fail():
        raise torch.OutOfMemoryError('no memory')

    candidates = {
        'right': lambda: expected + 1e-6, 'wrong': lambda: expected + 1e-3, 'nan': lambda: expected * torch.nan,
        'shape': lambda: expected[:, :2], 'fails': fail}
    with caplog.at_level(logging.WARNING):
        assert list(timing.agreeing(candidates, expected, 1e-5, 'this call')) == ['right']
    for text in ('wrong is left out for this call: it differs from F.conv2d by 0.001', 'nan is left out',
                 'shape is left out', 'fails is left out for this call: no memory'):
        assert text in caplog.text
