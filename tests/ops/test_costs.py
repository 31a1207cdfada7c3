"""The expected costs of the CPU's backends, by which one is chosen.

The oracle of the choices is what was measured on two kinds of machine, see `benchmarks/results.md`.
"""
from contextlib import contextmanager

import pytest
import torch
from conftest import CPU_BACKENDS, LAYOUTS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from timm_smpconv.ops.dispatch import costs, cpu
from timm_smpconv.ops.dispatch.choose import expected_fastest
from timm_smpconv.ops.dispatch.geometry import PASSES, Geometry

MACHINES = {
    name: cpu.CPU(capability, frozenset([torch.float32]))
    for name, capability in (('AVX-512', 'AVX512'), ('AVX2', 'AVX2'), ('neither', 'DEFAULT'))}


@contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def on(monkeypatch):
    """A function that makes this CPU one of `MACHINES`, of one thread, with oneDNN."""
    def on(name):
        monkeypatch.setattr(cpu, 'HERE', MACHINES[name])

    with threads(1):
        yield on


def image(b, c, h, w=None, layout='contiguous', dtype=torch.float32):
    return LAYOUTS[layout](torch.empty(b, c, h, w or h, dtype=dtype))


def choose(what, x, kh, kw, **kwargs):
    return expected_fastest(Geometry.of(what, x, kh, kw), **kwargs)


def case(what='output', b=2, c=32, h=28, k=21, channels_last=False):
    return Geometry(what, b, c, h, h, k, k, channels_last)


def test_rates_are_those_of_the_number_of_threads(on):
    on('AVX2')
    with threads(1):
        assert costs.rates() == costs.KINDS['AVX2'].one_thread
    with threads(2):
        assert costs.rates() == costs.KINDS['AVX2'].two_threads


@pytest.mark.parametrize('kh,kw', [(1, 1), (3, 3), (1, 9), (31, 1), (1, 51), (9, 1)])
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_small_kernels_are_native(kh, kw, layout):
    for what in PASSES:
        assert choose(what, image(2, 4, 40, 60, layout), kh, kw) == 'native'


def test_a_kernel_that_is_cropped_to_a_small_one_is_native():
    for h, w in ((1, 40), (40, 1), (2, 2)):
        for what in PASSES:
            assert choose(what, image(2, 3, h, w), 31, 31) == 'native'


CONTEXTS = {
    'autocast': lambda: torch.autocast('cpu', dtype=torch.bfloat16),
    'device': lambda: torch.device('meta'),  # what `torch.set_default_device` enters
    'fake': FakeTensorMode,
    'flops': lambda: FlopCounterMode(display=False),
    'inference': torch.inference_mode,
}


@pytest.mark.parametrize('context', CONTEXTS)
def test_the_choice_is_the_same_everywhere(context, on):
    x = image(4, 96, 56)
    chosen = [choose(what, x, 31, 31) for what in PASSES]
    with CONTEXTS[context]():
        inside = torch.empty(4, 96, 56, 56, device='cpu')
        assert [choose(what, inside, 31, 31) for what in PASSES] == chosen


# What follows from the rates


@pytest.mark.parametrize('what', PASSES)
@pytest.mark.parametrize('cheapest', CPU_BACKENDS)
def test_the_cheapest_is_chosen(what, cheapest, fastest, monkeypatch):
    fastest(cheapest)  # and nothing is remembered afterwards
    times = dict(zip(CPU_BACKENDS, (5, 4, 3, 2)))
    times[cheapest] = 1
    asked = []
    monkeypatch.setattr(
        costs, 'expected', lambda g, is_transformed=False: asked.append((g, is_transformed)) or dict(times))
    x = image(2, 5, 9, 20, 'channels_last', torch.float64)
    assert choose(what, x, 51, 7, is_transformed=True) == cheapest
    assert asked == [(Geometry(what, 2, 5, 9, 20, 17, 7, True, torch.float64), True)]  # 51 rows are cropped to 17
    assert choose(what, x, 51, 7, transform=False) == (cheapest if cheapest != 'fft' else 'channels_last')
    assert asked[1][1] is False


@pytest.mark.parametrize('machine', MACHINES)
@pytest.mark.parametrize('what', PASSES)
@pytest.mark.parametrize('onednn,channels_last', [(True, False), (True, True), (False, False), (False, True)])
def test_costs_grow_with_the_work(machine, what, onednn, channels_last, on, monkeypatch):
    on(machine)
    if not onednn:
        monkeypatch.setattr(cpu, 'HERE', cpu.HERE._replace(onednn=frozenset()))
    for c, h, k in ((32, 56, 31), (64, 28, 9), (64, 28, 29), (256, 14, 5), (512, 7, 13)):
        base = case(what, 2, c, h, k, channels_last)
        times = costs.expected(base)
        assert set(times) == set(CPU_BACKENDS)
        assert all(0 < time < 1e11 for time in times.values())
        for change in (dict(b=4), dict(c=2 * c)):
            more = costs.expected(base._replace(**change))
            assert all(times[name] < more[name] < 2.01 * times[name] for name in times)
        larger = costs.expected(base._replace(h=2 * h, w=2 * h))
        # Four times the outputs, and in each more of the kernel meets an image: up to four times as much.
        assert all(1.5 * times[name] < larger[name] < 16 * times[name] for name in times if what != 'weight gradient')
        assert times['fft'] < larger['fft'] < 6 * times['fft']
        # Two rows and columns more. Beyond its own program's widest kernel oneDNN may even be faster.
        wider = costs.expected(base._replace(kh=k + 2, kw=k + 2))
        assert all(times[name] <= wider[name] for name in times) or k == costs.kind().widest


@pytest.mark.parametrize('machine', MACHINES)
@pytest.mark.parametrize('what', PASSES)
def test_a_transform_hardly_depends_on_the_kernel(machine, what, on):
    """Not even where the transform gets longer by a sixth, for 51×51 on 56×56 after 31×31."""
    on(machine)
    small, large = (costs.expected(case(what, 4, 64, 56, k, True)) for k in (31, 51))
    assert large['fft'] < 1.4 * small['fft']
    assert all(large[name] > 2 * small[name] for name in CPU_BACKENDS if name != 'fft')


@pytest.mark.parametrize('what', PASSES)
def test_a_transform_that_is_there_is_saved(what, on):
    """A third of the transforms of an output; less of a weight gradient, which has one more."""
    on('AVX2')
    base = case(what, 16, 64, 56, 31)
    before, after = costs.expected(base), costs.expected(base, is_transformed=True)
    assert before['fft'] / 3 < before['fft'] - after.pop('fft') < before['fft'] / 2 or what == 'weight gradient'
    assert after.items() < before.items()
    assert costs.expected(base, is_transformed=True)['fft'] < before['fft']


# (machine, pass, (C, H, K, B, layout), the fastest measured: one of these)
KNOWN = [
    *((machine, what, (96, 56, 31, 4, layout), ('fft',))
      for machine in ('AVX2', 'AVX-512') for what in PASSES for layout in ('contiguous', 'channels_last')),
    *(('AVX-512', what, (64, 56, 51, 4, layout), ('fft',))
      for what in PASSES for layout in ('contiguous', 'channels_last')),
    *(('AVX2', what, (96, 56, 31, 1, 'channels_last'), ('fft',)) for what in PASSES),
    *(('AVX2', what, (192, 28, 29, 4, 'channels_last'), ('fft',)) for what in PASSES),
    ('AVX2', 'output', (384, 14, 27, 4, 'channels_last'), ('native', 'channels_last')),
    ('AVX2', 'output', (384, 14, 27, 4, 'contiguous'), ('channels_last',)),
    ('AVX-512', 'output', (192, 28, 29, 1, 'channels_last'), ('native',)),
    ('AVX-512', 'output', (384, 14, 27, 4, 'channels_last'), ('native',)),
    ('AVX2', 'weight gradient', (384, 14, 5, 1, 'channels_last'), ('native',)),
    *((machine, 'output', (c, h, 5, b, layout), ('native',))
      for machine in ('AVX2', 'AVX-512') for c, h in ((96, 56), (192, 28), (384, 14)) for b in (1, 4)
      for layout in ('contiguous', 'channels_last')),
    *((machine, 'weight gradient', (c, h, k, 4, layout), ('fft',))
      for machine in ('AVX2', 'AVX-512') for c, h, k in ((96, 56, 31), (192, 28, 29), (384, 14, 27))
      for layout in ('contiguous', 'channels_last')),
]


@pytest.mark.parametrize('machine,what,shape,fastest', KNOWN, ids=str)
def test_what_was_measured_to_be_fastest_is_chosen(machine, what, shape, fastest, on):
    on(machine)
    c, h, k, b, layout = shape
    assert choose(what, image(b, c, h, layout=layout), k, k) in fastest


@pytest.mark.parametrize('machine,k,name', [
    ('AVX-512', 11, 'native'), ('AVX-512', 13, 'native'), ('AVX-512', 15, 'channels_last'),
    ('AVX2', 9, 'native'), ('AVX2', 11, 'channels_last'), ('neither', 7, 'native'), ('neither', 9, 'channels_last')])
def test_the_choice_follows_the_vector_length(machine, k, name, on):
    on(machine)
    assert choose('output', image(1, 64, 28), k, k) == name
    assert choose('output', image(1, 64, 28, layout='channels_last'), k, k) == (
        'contiguous' if (machine, k) == ('AVX-512', 13) else 'native')


@pytest.mark.parametrize('machine', MACHINES)
@pytest.mark.parametrize('without', ['at all', 'for the dtype', 'by request'])
def test_the_choice_without_onednn(machine, without, on, monkeypatch):
    on(machine)
    if without == 'at all':
        monkeypatch.setattr(cpu, 'HERE', cpu.HERE._replace(onednn=frozenset()))
    x = image(1, 64, 28, dtype=torch.float64 if without == 'for the dtype' else torch.float32)
    with torch.backends.mkldnn.flags(enabled=without != 'by request'):
        for what in PASSES:
            assert [choose(what, x, k, k) for k in (3, 7, 31)] == ['native', 'fft', 'fft']


def test_half_precision_has_its_working_dtype(on, monkeypatch):
    on('AVX-512')
    g = case()._replace(dtype=torch.bfloat16)
    assert g.cropped() == g._replace(dtype=torch.float32)  # oneDNN lacks it
    monkeypatch.setattr(cpu, 'HERE', cpu.HERE._replace(onednn=frozenset([torch.float32, torch.bfloat16])))
    assert g.cropped() == g
    assert g._replace(c=8).cropped().dtype == torch.float32  # oneDNN would never return
