"""Shared by all tests: the seed, small models and images, `difference` and its tolerances, and what CI may skip."""
import os
import re
from contextlib import contextmanager

# For which CPU the tests run, whatever this one is: the variables that hold PyTorch's libraries back, and what is said
# of it. `nox -s cpu` runs them for each.
CPUS = {
    'avx512': ({}, 'AVX512', ('float32', 'bfloat16')),
    'avx2': (
        {'ATEN_CPU_CAPABILITY': 'avx2', 'ONEDNN_MAX_CPU_ISA': 'AVX2', 'MKL_ENABLE_INSTRUCTIONS': 'AVX2'},
        'AVX2', ('float32',)),
    'neither': (
        {'ATEN_CPU_CAPABILITY': 'default', 'ONEDNN_MAX_CPU_ISA': 'SSE41', 'MKL_ENABLE_INSTRUCTIONS': 'SSE4_2'},
        'DEFAULT', ('float32',)),
}
SAID_CPU = os.environ.get('TIMM_SMPCONV_TEST_CPU')
if SAID_CPU:
    for variable, value in CPUS[SAID_CPU][0].items():
        os.environ.setdefault(variable, value)  # read when torch is imported
if 'PYTEST_XDIST_WORKER' in os.environ:  # one thread a worker, also in the processes that it starts
    os.environ.update(OMP_NUM_THREADS='1', TORCHINDUCTOR_COMPILE_THREADS='1')  # read when torch is imported

os.environ['HF_ASSETS_CACHE'] = os.devnull  # no weights there, whatever this user has; read when imported

import torch

if not torch.cuda.is_available():
    os.environ['TRITON_INTERPRET'] = '1'  # read when Triton is imported, which timm does

import pytest
import timm
import torch.nn.functional as F
from hub_server import HubServer
from huggingface_hub import constants, file_download
from reference import in_authors_layout
from timm.models import save_for_hf

from timm_smpconv.ops import BACKENDS
from timm_smpconv.ops.dispatch import choose, costs, cpu

IMAGENET_MODELS = ('smpconv_tiny', 'smpconv_base', 'smpconv_mobile31', 'smpconv_mobile51')
SEQUENCE_MODELS = tuple(f'smpconv_tcn_{task}' for task in ('smnist', 'pmnist', 'scifar10', 'ct', 'sc', 'scraw'))
MODELS = (*IMAGENET_MODELS, 'smpconv_resnet_cifar10', *SEQUENCE_MODELS)

SMALL = dict(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), kernel_sizes=(9, 7, 7, 5))  # of `small_model`

TOKENS = {  # users of the Hub of hub_server.py
    'hf_writer': {'name': 'alice', 'orgs': ['timm-smpconv'], 'role': 'write'},
    'hf_reader': {'name': 'bob', 'orgs': ['timm-smpconv'], 'role': 'read'},
    'hf_stranger': {'name': 'eve', 'role': 'write'},
}

if SAID_CPU:
    cpu.HERE = cpu.CPU(CPUS[SAID_CPU][1], frozenset(getattr(torch, dtype) for dtype in CPUS[SAID_CPU][2]))

CPU_BACKENDS = [name for name in BACKENDS if name != 'triton']

# Reasons for which tests may be skipped in CI.
MAY_LACK = re.compile(r"GPU|AVX-512|timm's scripts|authors' code|ultralytics|before (torch|timm) [\d.]+")

# Largest `difference` allowed.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

LAYOUTS = {
    'contiguous': torch.Tensor.contiguous,
    'channels_last': lambda x: x.contiguous(memory_format=torch.channels_last),
    'transposed': lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    'strided': lambda x: torch.stack([x, x + 1], -1)[..., 0],
}


def depthwise(x, weight, bias=None):
    """`F.conv2d` of each channel: the oracle of the operator."""
    return F.conv2d(x, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2), groups=weight.shape[0])


def with_gradients(convolve, x, weight, cotangent):
    """Output, input gradient and weight gradient."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = convolve(x, weight)
    return (y.detach(), *torch.autograd.grad(y, (x, weight), cotangent))


def exact_results(*inputs):
    """Those of `depthwise` in float64 on the CPU."""
    return with_gradients(depthwise, *(t.cpu().double() for t in inputs))


def compare(inputs, function, oracle, tolerance):
    """Output and all gradients of `function` against `oracle` in float64 on the same (rounded) numbers."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    actual, expected = function(*leaves), oracle(*wide)
    assert actual.dtype == inputs[0].dtype
    assert difference(actual, expected) < tolerance
    cotangent = torch.randn_like(expected).to(actual.dtype)
    grads = torch.autograd.grad(actual, leaves, cotangent)
    for leaf, got, want in zip(leaves, grads, torch.autograd.grad(expected, wide, cotangent.double())):
        assert got.dtype == leaf.dtype and got.shape == leaf.shape
        assert difference(got, want) < 2 * tolerance  # a weight's gradient is a sum of terms that cancel


def difference(actual, expected):
    """Largest difference relative to the largest magnitude expected in the same channel.

    Channels are dimension 1, and dimension 0 of a matrix or where dimension 1 has one entry, as in a depthwise weight
    (C, 1, K, L); a vector is one channel. The magnitude is at least a hundredth of the largest of all channels, since
    small values may be sums of large ones. NaN and infinity must stand in the same places.
    """
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    finite = actual.isfinite() & expected.isfinite()
    torch.testing.assert_close(actual[~finite], expected[~finite], rtol=0, atol=0, equal_nan=True)
    error, magnitude = (actual - expected).where(finite, 0).abs(), expected.where(finite, 0).abs()
    channel = 1 if expected.ndim > 2 and expected.shape[1] > 1 else 0
    error, magnitude = (
        (t.movedim(channel, 0).flatten(1) if t.ndim > 1 else t.reshape(1, -1)).amax(1) for t in (error, magnitude))
    scale = magnitude.clamp(min=magnitude.max() / 100)
    return (error / scale).where(error > 0, 0).max().item()


def shake_norms(model, seed=0):
    """Give every BatchNorm of a model statistics and an affine map that are far from the identity, negative too."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            shape = module.running_var.shape
            with torch.no_grad():
                module.running_mean.copy_(torch.randn(shape, generator=generator) * 0.2)
                module.running_var.copy_(torch.rand(shape, generator=generator) + 0.5)
                module.weight.copy_(torch.rand(shape, generator=generator) + 0.5)
                module.weight[::3] *= -1
                module.bias.copy_(torch.randn(shape, generator=generator) * 0.2)
    return model


def wake_weights(model):
    """Give every convolution, kernel and classifier weights of unit gain: with the initial ones the logits of a narrow
    model hardly depend on the image."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and not name.endswith(('coords', 'radius')):
                gain = 0.2 if name.endswith('kernel.weight') else weight[0].numel() ** -0.5
                weight.copy_(torch.randn(weight.shape) * gain)
    return model


def small_model(shake=True, **kwargs):
    """A network of the package's classes that runs in milliseconds, in evaluation mode.

    By default it goes through `shake_norms` and `wake_weights`.
    """
    torch.manual_seed(0)
    model = timm.create_model('smpconv_tiny', **{**SMALL, 'num_classes': 10, **kwargs}).eval()
    return wake_weights(shake_norms(model)) if shake else model


FAMILIES = {  # a narrow network, and the shape of an input
    'images': (lambda: small_model(depths=(1, 1, 1, 1)), (2, 3, 64, 96)),
    'CIFAR-10': (lambda: timm.create_model('smpconv_resnet_cifar10', dims=(8, 12), kernel_size=9), (2, 3, 16, 20)),
    'sequences': (lambda: timm.create_model('smpconv_tcn_ct', seq_len=40, dim=6, depth=2), (2, 3, 33)),
}


def interrupt(*args, **kwargs):
    """What Ctrl+C does. (The signal itself ends a test's process if a library has replaced Python's handler.)"""
    raise KeyboardInterrupt


@contextmanager
def full_disk(size):
    """Files may have so many bytes inside."""
    import resource  # which Windows lacks

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def fail_if_missing(report):
    """Fail a test that is skipped in CI, where nobody would notice, unless its reason is in MAY_LACK."""
    if not (os.environ.get('CI') and report.skipped) or hasattr(report, 'wasxfail'):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not MAY_LACK.search(reason):
        report.outcome, report.longrepr = 'failed', f'must not be skipped in CI. {reason}'


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    report = yield
    fail_if_missing(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    state = torch.get_rng_state()
    report = yield
    fail_if_missing(report)
    if not torch.equal(torch.get_rng_state(), state):
        report.outcome, report.longrepr = 'failed', (
            f'{collector.nodeid} draws random numbers while tests are collected, before the seed is set. Build modules '
            'and tensors in the test: parametrize it with functions that return them.')
    return report


def pytest_itemcollected(item):
    if item.get_closest_marker('gpu') and not torch.cuda.is_available():
        item.add_marker(pytest.mark.skip(reason='needs a GPU'))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def fastest(monkeypatch):
    """A function that makes the cost model expect one backend to be the fastest everywhere, and 'native' the next."""
    def fastest(name):
        times = {'native': 2., 'contiguous': 3., 'channels_last': 4., 'fft': 5., name: 1.}
        monkeypatch.setattr(costs, 'expected', lambda g, is_transformed=False: dict(times))
        choose._cached.cache_clear()

    yield fastest
    choose._cached.cache_clear()


@pytest.fixture
def calls(monkeypatch):
    """The backends that compute, in order, each with the name of its function."""
    found = []

    def recording(call, function):
        return lambda *args: found.append(call) or function(*args)

    for name, backend in list(BACKENDS.items()):
        monkeypatch.setitem(BACKENDS, name, backend._replace(**{
            part: recording((name, part), getattr(backend, part))
            for part in ('conv', 'input_gradient', 'weight_gradient', 'gradients') if getattr(backend, part)}))
    return found


@pytest.fixture
def model():
    return small_model()


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 96)


@pytest.fixture
def authors(model):
    """The weights of the small model as the authors' code would save them."""
    sd = in_authors_layout(model.state_dict())
    for key, value in list(sd.items()):
        if key.endswith('.radius'):
            sd[key] = value.reshape(1, -1, 1, 1)
            sd[key.replace('radius', 'kernel_coord')] = torch.zeros(1, 2, 3, 3)
    return sd


@pytest.fixture
def file(tmp_path, model):
    """The small model's weights and its classifier of 10 classes."""
    torch.save(model.state_dict(), tmp_path / 'ours.pth')
    return str(tmp_path / 'ours.pth')


@pytest.fixture
def folder(tmp_path):
    """A folder of timm's with the weights of another small model, of 10 classes too."""
    other = small_model()
    torch.nn.init.normal_(other.head.fc.weight)
    save_for_hf(other, tmp_path / 'folder', model_args=SMALL, safe_serialization='both')
    return tmp_path / 'folder'


@pytest.fixture
def server(monkeypatch):
    with HubServer(TOKENS) as server:
        # As server.environment() does for another process. huggingface_hub 0.26 needs more than its endpoint argument.
        monkeypatch.setenv('NO_PROXY', '127.0.0.1')
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True, raising=False)
        monkeypatch.setattr(constants, 'ENDPOINT', server.url)
        for module in constants, file_download:
            template = server.url + '/{repo_id}/resolve/{revision}/{filename}'
            monkeypatch.setattr(module, 'HUGGINGFACE_CO_URL_TEMPLATE', template, raising=False)
        yield server
