"""`timm-smpconv backends`: its cases, its clock, its page. Times come from a clock that the tests set."""
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import SMALL, TOLERANCE, difference, small_model

from timm_smpconv.__main__ import main
from timm_smpconv.ops import BACKENDS
from timm_smpconv.ops.dispatch import choose, costs, cpu, timing
from timm_smpconv.tools import backend_report as backends
from timm_smpconv.tools.backend_report import PASSES, Geometry, Result

TINY = [(96, 56, 31), (192, 28, 29), (384, 14, 27), (768, 7, 13)]  # (C, H, K), from the paper's table 9
MOBILE51 = [(64, 56, 51), (128, 28, 49), (256, 14, 47), (320, 7, 13)]


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    """The rates of one thread."""
    found = costs.kind().one_thread
    monkeypatch.setattr(costs, 'rates', lambda: found)
    choose._cached.cache_clear()


@pytest.fixture
def small(monkeypatch):
    """A small network in place of all models."""
    create = timm.create_model
    monkeypatch.setattr(timm, 'create_model', lambda name, **kwargs: create(name, **SMALL, **kwargs))


class Clock:
    """Time that passes when a backend runs: so many seconds for each. The names of all that ran are in `ran`."""

    def __init__(self, seconds):
        self.now, self.seconds, self.ran = 0., seconds, []

    def __call__(self):
        return self.now

    def run(self, case, x, weight, grad, backend=None):
        self.ran.append(backend)
        self.now += self.seconds[backend]
        return x


@pytest.fixture
def clock(monkeypatch):
    def use(seconds):
        clock = Clock(seconds)
        monkeypatch.setattr(cpu, 'HERE', cpu.CPU('AVX512', frozenset([torch.float32])))  # whatever this one is
        monkeypatch.setattr(timing, '_clock', clock)
        monkeypatch.setattr(backends, 'run', clock.run)
        return clock
    return use


@pytest.mark.parametrize('name,shapes', [('smpconv_tiny', TINY), ('smpconv_mobile51', MOBILE51)])
def test_cases_of_a_model(name, shapes):
    model = timm.create_model(name, device='meta')
    found = backends.cases(model, (3, 224, 224), (1, 4), (True, False), torch.bfloat16)
    expected = {
        Geometry(what, b, c, h, h, kernel, kernel, last, torch.bfloat16)
        for what in PASSES for b in (1, 4) for last in (True, False) for c, h, k in shapes for kernel in (k, 5)}
    assert set(found) == expected and len(found) == len(expected)
    assert [case.b for case in found] == sorted(case.b for case in found)


def test_cases_of_another_size():
    found = backends.cases(small_model(shake=False).to('meta'), (3, 64, 96))
    assert {(case.c, case.h, case.w) for case in found} == {(8, 16, 24), (16, 8, 12), (24, 4, 6), (32, 2, 3)}
    with pytest.raises(ValueError, match='must have depthwise convolutions of stride 1'):
        backends.cases(timm.create_model('smpconv_resnet_cifar10', device='meta'), (3, 32, 32))


@pytest.mark.parametrize('backend', [None, 'native', 'contiguous', 'channels_last', 'fft'])
@pytest.mark.parametrize('what', PASSES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_a_run_is_the_convolution(what, backend, dtype):
    case = Geometry(what, 2, 4, 9, 7, 11, 17, True, dtype)  # columns of the kernel that meet nothing but padding
    x, weight, grad = backends.inputs(case)
    assert x.is_contiguous(memory_format=torch.channels_last) and grad.shape == x.shape
    leaves = [t.double().requires_grad_() for t in (x, weight)]
    y = F.conv2d(*leaves, padding=(5, 8), groups=4)
    expected = dict(zip(PASSES, (y, *torch.autograd.grad(y, leaves, grad.double()))))[what]
    found = backends.run(case, x, weight, grad, backend)
    assert found.dtype == dtype and difference(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('what', PASSES)
def test_the_backend_taken_is_the_operators(what, channels_last, calls):
    """Which backend's functions are called, for kernels of all sizes."""
    taken = set()
    for c, h, k in ((32, 14, 5), (32, 28, 29), (64, 7, 13), (32, 56, 31), (8, 3, 5)):
        case = Geometry(what, 1, c, h, h, k, k, channels_last)
        result = backends.expect(case)
        calls.clear()
        backends.run(case, *backends.inputs(case))
        assert [name for name, _ in calls] == [result.taken]
        assert result.taken == min(result.expected, key=result.expected.__getitem__) or 'always native' in result.note
        taken.add(result.taken)
    assert len(taken) > 1


def test_the_same_computation_is_not_timed_twice():
    case = Geometry('output', 1, 8, 14, 14, 9, 9)
    for what, last, dtype, missing in (
        ('output', False, torch.float32, 'contiguous'), ('output', True, torch.float32, 'channels_last'),
        ('weight gradient', True, torch.float32, 'channels_last'), ('weight gradient', True, torch.bfloat16, None),
        ('weight gradient', False, torch.bfloat16, 'contiguous'), ('input gradient', False, torch.float32, None),
    ):
        found = backends.expect(case._replace(what=what, channels_last=last, dtype=dtype)).expected
        assert found.keys() == {'native', 'contiguous', 'channels_last', 'fft'} - {missing}


CASE = Geometry('output', 1, 8, 14, 14, 9, 9)


def test_slow_backends_have_no_part_in_the_rounds(clock):
    """How they are timed: tests/ops/test_timing.py."""
    used = clock({'native': 0.004, 'channels_last': 0.013, 'fft': 0.001})
    result = backends.measure(CASE)
    assert {n: round(ms, 6) for n, ms in result.times.items()} == {'native': 4, 'channels_last': 13, 'fft': 1}
    assert used.ran.count('channels_last') == 5 and used.ran.count('native') == 5  # to warm up
    assert used.ran.count('fft') == 5 + 2 * 15  # as many rounds as are allowed
    assert result.ratio == pytest.approx(result.times[result.taken] / 1)


def test_results_are_checked_before_anything_is_timed(clock):
    used = clock({'native': 0.004, 'channels_last': 0.013, 'fft': 0.001})
    checked = []
    backends.measure(CASE, check=lambda case, name, actual: checked.append((case, name, len(used.ran))))
    assert checked == [(CASE, name, i + 1) for i, name in enumerate(used.ran[:3])]
    assert set(used.ran[:3]) == {'native', 'channels_last', 'fft'}


def test_slow_backends_are_left_out_of_larger_batches(clock):
    clock({'native': 0.004, 'channels_last': 0.013, 'fft': 0.001})
    other = CASE._replace(what='weight gradient')
    first, second, third = backends.measure_all([CASE, CASE._replace(b=4), other])
    assert first.times.keys() == {'native', 'channels_last', 'fft'} == third.times.keys()
    assert second.times.keys() == {'fft', second.taken}


RESULTS = [
    Result(CASE, 'fft', {'native': 2., 'fft': 1.}, {'native': 3., 'fft': 4.}),
    Result(CASE._replace(b=4), 'native', {'native': 2., 'fft': 3.}, {'native': 2., 'fft': 2.5}),
    Result(CASE._replace(c=1), 'native', {'native': 2., 'fft': 3.}, {'native': 1600., 'fft': 1000.}),
    Result(CASE, 'native', {'native': 2.}, {}),
]


def test_the_summary_counts_and_names_the_worst():
    assert backends.summary(RESULTS, worst=1) == [
        'taken: within 1.15 × of the fastest in 1 of 3 cases, within 1.5 × of the fastest in 2 of 3 cases',
        '  1.60 ×: C 1, 14×14, 9×9, output, batch 1, contiguous, float32, cpu: ms native 1600, fft 1000',
    ]
    assert [line.split()[0] for line in backends.summary(RESULTS)[1:]] == ['1.60', '1.33']
    assert backends.summary(RESULTS[3:]) == ['nothing was measured']


def test_a_row_marks_what_is_taken():
    assert ' '.join(backends.row(RESULTS[0]).split()) == '8 14×14 9×9 output fft 1.33 0.75 native 2 / 3, *fft 1 / 4'
    assert ' '.join(backends.row(RESULTS[3]).split()) == '8 14×14 9×9 output native *native 2'


def lines_of(out, pattern):
    return [line for line in out.splitlines() if re.search(pattern, line)]


def test_the_machine_comes_with_the_settings_that_times_depend_on(monkeypatch):
    monkeypatch.delenv('MALLOC_MMAP_MAX_', raising=False)
    assert 'MALLOC_MMAP_MAX_' not in backends.machine()
    monkeypatch.setenv('MALLOC_MMAP_MAX_', '0')
    monkeypatch.setenv('ONEDNN_MAX_CPU_ISA', 'AVX2')
    assert {'MALLOC_MMAP_MAX_=0', 'ONEDNN_MAX_CPU_ISA=AVX2'} <= set(backends.machine().split(', '))


def test_the_page(small, capsys):
    assert main(['backends', 'smpconv_tiny', '--image-size', '64', '--batch', '2', '1', '--device', 'cpu']) == 0
    out, err = capsys.readouterr()
    assert not err
    machine, rates = out.splitlines()[:2]
    assert f'torch {torch.__version__}' in machine and f'{torch.get_num_threads()} threads' in machine
    assert f'wide {costs.kind().one_thread.wide:.3g}' in rates
    assert lines_of(out, '^smpconv_tiny') == [
        f'smpconv_tiny, 64×64, batch {b}, contiguous, float32, cpu' for b in (1, 2)]
    assert len(lines_of(out, r'\*')) == 1 + 2 * 3 * 7  # of 4 stages; in the last both kernels are 5×5
    assert len(lines_of(out, r'^ +8 +16×16 +9×9 ')) == 2 * 3
    assert 'within' not in out


def test_the_page_with_times(small, clock, capsys):
    clock({'native': 0.004, 'contiguous': 0.005, 'channels_last': 0.003, 'fft': 0.001})
    arguments = ['smpconv_tiny', '--image-size', '64', '--dtype', 'bfloat16', '--channels-last', '--device', 'cpu']
    assert main(['backends', *arguments, '--measure']) == 0
    out = capsys.readouterr().out
    assert 'smpconv_tiny, 64×64, batch 1, channels_last, bfloat16, cpu' in out
    rows = lines_of(out, r'^ +\d+ +\d+×\d')
    assert len(rows) == 3 * 7 and all(re.search(r'native [\d.]+ / 4[, ]', row) for row in rows)
    count = sum('*fft' in row for row in rows)
    assert f'within 1.15 × of the fastest in {count} of 21 cases' in out


@pytest.mark.parametrize('arguments,said', [
    (['smpconv_tinny'], "MODEL must be one of .*, got 'smpconv_tinny'"),
    (['resnet18'], "MODEL must be one of .*, got 'resnet18'"),
    (['smpconv_tiny', 'smpconv_tcn_ct'], "MODEL must have large .* got 'smpconv_tcn_ct'"),
    (['smpconv_tiny', '--image-size', '31'], '--image-size must fit smpconv_tiny, got 31: .* at least 32'),
    (['--device', 'cuda'], "--device must be cpu where there is no CUDA GPU, got 'cuda'"),
])
def test_bad_input_is_one_sentence(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert main(['backends', *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and re.fullmatch(f'timm-smpconv backends: {said}.*\n', err)


@pytest.mark.parametrize('arguments', [['--batch', '0'], ['--image-size', 'x'], ['--dtype', 'float'], ['--batch']])
def test_bad_options(arguments, capsys):
    with pytest.raises(SystemExit, match='2'):
        main(['backends', *arguments])
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize('error', [
    torch.OutOfMemoryError('CUDA out of memory'), RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    RuntimeError('a defect')], ids=str)
def test_too_little_memory_is_one_sentence_and_other_errors_are_not_hidden(error, monkeypatch, capsys):
    def fail(*args):
        raise error

    monkeypatch.setattr(backends, 'expect', fail)
    if str(error) == 'a defect':
        with pytest.raises(RuntimeError, match='a defect'):
            main(['backends', 'smpconv_tiny', '--device', 'cpu'])
        return
    assert main(['backends', 'smpconv_tiny', '--device', 'cpu']) == 2
    assert re.fullmatch(r'timm-smpconv backends: --batch and --image-size must fit .*\n', capsys.readouterr().err)


@pytest.fixture
def gpu(monkeypatch):
    """CPU tensors that are said to be on a GPU, where `fft` is the fastest; `contiguous` is wrong."""
    make, seconds, clock = backends.inputs, {'native': 2., 'fft': 1., 'contiguous': 0.5}, Clock({})

    def timed(name, function):
        def run(*args):
            clock.now += seconds[name]
            return function(*args) * (1.5 if name == 'contiguous' else 1.)
        return run

    for name in list(BACKENDS):
        if name in seconds:
            monkeypatch.setitem(BACKENDS, name, BACKENDS[name]._replace(**{
                part: timed(name, getattr(BACKENDS[name], part))
                for part in ('conv', 'input_gradient', 'weight_gradient')}))
        else:
            monkeypatch.setitem(BACKENDS, name, BACKENDS[name]._replace(unsupported=lambda x: 'here'))
    monkeypatch.setattr(timing, '_clock', clock)
    monkeypatch.setattr(backends, 'inputs', lambda case: make(case._replace(device='cpu')))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'NVIDIA H200')


def test_the_page_of_a_gpu(small, gpu, capsys):
    assert main(['backends', 'smpconv_tiny', '--image-size', '64']) == 0
    out = capsys.readouterr().out
    assert 'NVIDIA H200 of compute capability 9.0' in out.splitlines()[0] and 'see --measure' in out.splitlines()[1]
    rows = lines_of(out, r'^ +\d+ +\d+×\d')
    assert len(rows) == 3 * 7
    assert all('(in benchmark mode the fastest of native, contiguous, fft; not here)' in row for row in rows)


def test_the_times_of_a_gpu(small, gpu, capsys):
    assert main(['backends', 'smpconv_tiny', '--image-size', '64', '--measure']) == 0
    out = capsys.readouterr().out
    rows = lines_of(out, r'^ +\d+ +\d+×\d')
    assert len(rows) == 3 * 7
    for row in rows:
        assert re.search(r' fft +1\.00 +2\.00 +native 2000, \*fft 1000$', row)
    assert 'within 1.15 × of the fastest in 21 of 21 cases' in out
