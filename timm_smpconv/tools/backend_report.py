"""What this machine takes for the depthwise convolutions of a model, and why: `timm-smpconv backends`.

Shapes: B batch, C channels, H and W height and width of the map, KH and KW height and width of the kernel.
"""
import itertools
import math
import os
import platform
import re
from functools import partial
from pathlib import Path
from typing import Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple, cast

import timm
import torch

from .. import __version__
from ..layers.small_conv import DepthwiseConv2d
from ..layers.smp_conv import SMPConv2d
from ..ops import BACKENDS, Kept
from ..ops.dispatch import costs, run as passes
from ..ops.dispatch.choose import expected_fastest
from ..ops.dispatch.geometry import FORMATS, PASSES, Geometry
from ..ops.dispatch.timing import timing

__all__ = [
    'PASSES', 'Geometry', 'Result', 'cases', 'expect', 'header', 'inputs', 'machine', 'measure', 'measure_all', 'page',
    'rates', 'row', 'run', 'summary']

SLOW = 3  # times slower than the fastest: not timed again
SECONDS = 0.25  # that the rounds of a case take, about
ROUNDS = 15  # at most
Run = Callable[[], torch.Tensor]


class Result(NamedTuple):
    """What is known of a case.

    Attributes:
        case: The pass.
        taken: The backend that computes it.
        expected: The milliseconds of each backend by `dispatch.costs`, on the CPU.
        times: The milliseconds measured.
        note: What else decides.
    """
    case: Geometry
    taken: str
    expected: Dict[str, float]
    times: Dict[str, float]
    note: str = ''

    @property
    def ratio(self) -> float:
        """The time of the backend taken, in times of the fastest."""
        return self.times[self.taken] / min(self.times.values())


def cases(
        model: torch.nn.Module,
        input_size: Sequence[int],
        batch: Sequence[int] = (1,),
        channels_last: Sequence[bool] = (False,),
        dtype: torch.dtype = torch.float32,
        device: str = 'cpu',
) -> List[Geometry]:
    """The passes of a model's distinct depthwise convolutions: the large kernels and the branches beside them.

    3×3 kernels are left out: those are always 'native'.

    Args:
        model: Unmerged, on the meta device.
        input_size: Of an image, (channels, height, width).
        batch: Sizes of the batch, in the order in which they are to be measured.
        channels_last: Memory formats.
        dtype: Of the input and the weight.
        device: 'cpu' or 'cuda'.

    Raises:
        ValueError: The model has no such convolution, or does not take such images.

    Example:
        >>> model = timm.create_model('smpconv_tiny', device='meta')
        >>> for case in cases(model, (3, 224, 224))[:4]:
        ...     print(case)
        C 96, 56×56, 31×31, output, batch 1, contiguous, float32, cpu
        C 96, 56×56, 31×31, input gradient, batch 1, contiguous, float32, cpu
        C 96, 56×56, 31×31, weight gradient, batch 1, contiguous, float32, cpu
        C 96, 56×56, 5×5, output, batch 1, contiguous, float32, cpu
    """
    found: Dict[Tuple[int, int, int, int, int], None] = {}  # (C, H, W, KH, KW), in order

    def collect(module, inputs, output):
        found[*inputs[0].shape[1:], *module.kernel_size] = None

    layers = [module for module in model.modules() if _has_backends(module)]
    if not layers:
        raise ValueError('model must have depthwise convolutions of stride 1 and kernels beyond 3×3, got none')
    hooks = [module.register_forward_hook(collect) for module in layers]
    try:
        with torch.no_grad():
            model.eval()(torch.empty(1, *input_size, device='meta'))
    finally:
        for hook in hooks:
            hook.remove()
    return [
        Geometry(what, b, *sizes, last, dtype, device)
        for b, last, sizes, what in itertools.product(batch, channels_last, found, PASSES)]


def _has_backends(module: torch.nn.Module) -> bool:
    """Whether it calls `depthwise_conv2d` and a backend is chosen."""
    ours = isinstance(module, DepthwiseConv2d) or (
        isinstance(module, SMPConv2d) and module.depthwise and module.keeps_size)
    return ours and math.prod(module.kernel_size) > 9  # type: ignore[arg-type]


def inputs(case: Geometry) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random x (B, C, H, W) and weight (C, 1, KH, KW), and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)

    def image() -> torch.Tensor:
        return torch.randn(case.b, case.c, case.h, case.w, generator=generator).to(
            case.device, case.dtype, memory_format=_memory_format(case))

    weight = torch.randn(case.c, 1, case.kh, case.kw, generator=generator) / math.sqrt(case.kh * case.kw)
    return image(), weight.to(case.device, case.dtype), image()


def _memory_format(case: Geometry) -> torch.memory_format:
    return torch.channels_last if case.channels_last else torch.contiguous_format


def run(
        case: Geometry,
        x: torch.Tensor,
        weight: torch.Tensor,
        grad: torch.Tensor,
        backend: Optional[str] = None,
) -> torch.Tensor:
    """Compute a pass by a backend, or by the chosen one, as `depthwise_conv2d` does."""
    dtype = x.dtype
    if backend is not None:  # the choice also says in which dtype to compute
        x, weight, grad = (t.to(case.cropped().dtype) for t in (x, weight, grad))
    if case.what == 'output':
        y = passes.conv(x, weight, None, backend)
    elif case.what == 'input gradient':
        y = cast(torch.Tensor, passes.gradients(grad, x, weight, backend, (True, False))[0])
    else:
        y = passes.weight_gradient(grad, x, case.kh, case.kw, backend)
    return y.to(dtype)


def expect(case: Geometry) -> Result:
    """The backend taken and, on the CPU, the expected times that decide it; on CUDA, which backends can run."""
    # On CUDA the shape alone is asked for, and every backend says of a meta tensor what it says of one on CUDA.
    device = 'cpu' if case.device == 'cpu' else 'meta'
    x = torch.empty(case.b, case.c, case.h, case.w, dtype=case.dtype, device=device, memory_format=_memory_format(case))
    taken = expected_fastest(case)
    if case.device != 'cpu':
        reasons = {name: backend.unsupported(x) for name, backend in BACKENDS.items()}
        able = ', '.join(name for name, reason in reasons.items() if reason is None)
        missing = ''.join(f'; not {reason}' for reason in dict.fromkeys(filter(None, reasons.values())))
        return Result(case, taken, {}, {}, f'in benchmark mode the fastest of {able}{missing}')
    cost = case.cropped()
    times = costs.expected(cost)
    expected = {name: times[name] / 1e6 for name in _backends(case, x)}
    note = ''
    if cost.kh * cost.kw <= 9 or min(cost.kh, cost.kw) == 1:
        note = f'{cost.kh}×{cost.kw} taps meet the map: always native'
    elif case.what == 'input gradient' and taken != 'fft' and 'fft' == expected_fastest(
            case._replace(what='weight gradient')) == expected_fastest(case, is_transformed=True):
        note = 'beside the weight gradient fft, with one transform for both'
    return Result(case, taken, expected, {}, note)


def _backends(case: Geometry, x: torch.Tensor) -> List[str]:
    """Those that run on the CPU, without the one that is the same as 'native'."""
    names = [name for name, backend in BACKENDS.items() if backend.unsupported(x) is None]
    same = FORMATS[case.channels_last]
    # As 'channels_last', a weight gradient in half precision is computed in float32.
    if case.what == 'output' or (
            case.what == 'weight gradient' and (same == 'contiguous' or x.dtype.itemsize >= 4)):
        names.remove(same)
    # In Triton's interpreter, a program takes minutes.
    return [name for name in names if name != 'triton']


def measure(
        case: Geometry,
        skip: Iterable[str] = (),
        check: Optional[Callable[[Geometry, str, torch.Tensor], None]] = None,
        seconds: float = SECONDS,
) -> Result:
    """What `expect` says, and the time of every backend; on CUDA of those that are right: the fastest is taken.

    Times are medians of rounds in which the backends take turns. One that takes more than `SLOW` times as long as the
    fastest once it is warm has no part in them.

    Args:
        case: The pass.
        skip: Backends that are not timed, unless taken.
        check: Called with the case, a backend and its result before anything is timed.
        seconds: That the rounds take, about.
    """
    found = expect(case)
    tensors = inputs(case)
    with torch.inference_mode():
        if case.device != 'cpu':
            return _measured_as_in_benchmark_mode(found, tensors)
        names = [name for name in found.expected if name not in skip or name == found.taken]
        runs: Dict[str, Run] = {name: partial(run, case, *tensors, name) for name in names}
        if check:
            for name, compute in runs.items():
                check(case, name, compute())
        times = timing(runs, ROUNDS, warmup=5, slow=SLOW, seconds=seconds)
    return found._replace(times=times)


def _measured_as_in_benchmark_mode(found: Result, tensors: Tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> Result:
    case, x = found.case, tensors[0]
    runs = {
        name: partial(run, case, *tensors, name)
        for name, backend in BACKENDS.items() if backend.unsupported(x) is None}
    times = Kept().measure(case, runs, runs['native'](), case.dtype, str(case))
    return found._replace(taken=min(times, key=times.__getitem__, default='native'), times=times, note='')


def measure_all(
        cases: Iterable[Geometry],
        check: Optional[Callable[[Geometry, str, torch.Tensor], None]] = None,
        seconds: float = SECONDS,
) -> Iterator[Result]:
    """`measure` each case.

    A backend that was slow (`SLOW`) is not timed again for a later case that differs in the batch alone, unless taken.
    """
    slow: Dict[Geometry, Set[str]] = {}  # by the case with batch 0
    for case in cases:
        names = slow.setdefault(case._replace(b=0), set())
        result = measure(case, names, check, seconds)
        best = min(result.times.values(), default=0)
        names |= {name for name, ms in result.times.items() if ms > SLOW * best}
        yield result


def row(result: Result) -> str:
    """One line of a table."""
    case, times = result.case, result.times
    cells = []
    for name in dict.fromkeys([*result.expected, *times]):
        values = [_short(source[name]) if name in source else '–' for source in (result.expected, times) if source]
        cells.append(f'{"*" if name == result.taken else ""}{name} {" / ".join(values)}')
    line = f'{case.c:5} {f"{case.h}×{case.w}":>9} {f"{case.kh}×{case.kw}":>7}  {case.what:15}  {result.taken:14}'
    if result.taken in times:
        native = f'{times["native"] / times[result.taken]:.2f}' if 'native' in times else '–'
        line += f' {result.ratio:6.2f} {native:>7}  '
    return (line + ', '.join(cells) + (f'  ({result.note})' if result.note else '')).rstrip()


def _short(value: float) -> str:
    return f'{value:.0f}' if value >= 100 else f'{value:.3g}'


def header(measured: bool, device: str) -> str:
    """The line above the rows: `/ best` and `native` are in times of the fastest and of the one taken."""
    line = f'{"C":>5} {"map":>9} {"kernel":>7}  {"pass":15}  {"taken":14}'
    expected = ['expected'] if device == 'cpu' else []
    if measured:
        line += f' {"/ best":>6} {"native":>7}  '
    return line + f'ms: {" / ".join(expected + ["measured"] * measured)}' if expected or measured else line.rstrip()


def summary(results: Iterable[Result], worst: int = 10) -> List[str]:
    """How often the backend taken was about the fastest, and where it was furthest from that."""
    results = [result for result in results if result.taken in result.times]
    if not results:
        return ['nothing was measured']
    counts = [
        f'within {limit} × of the fastest in {sum(r.ratio <= limit for r in results)} of {len(results)} cases'
        for limit in (1.15, 1.5)]
    lines = [f'taken: {", ".join(counts)}']
    for result in sorted(results, key=lambda r: -r.ratio)[:worst]:
        if result.ratio > 1:
            best = min(result.times, key=lambda name: result.times[name])
            named = ', '.join(f'{name} {_short(result.times[name])}' for name in (result.taken, best))
            lines.append(f'  {result.ratio:.2f} ×: {result.case}: ms {named}')
    return lines


# Environment variables on which times depend: what oneDNN may use, and whether the C library keeps memory.
_SETTINGS = ('ONEDNN_MAX_CPU_ISA', 'DNNL_MAX_CPU_ISA', 'MALLOC_MMAP_MAX_', 'MALLOC_TRIM_THRESHOLD_')


def machine() -> str:
    """One line on the processor, the GPU, the settings and the versions."""
    onednn = re.search(r'MKL-DNN v([\d.]+)', torch.__config__.show())
    parts = [
        _processor(), f'{os.cpu_count()} cores', f'{torch.get_num_threads()} threads',
        torch.backends.cpu.get_cpu_capability(), f'oneDNN {onednn[1] if onednn else "none"}',
        *(f'{name}={os.environ[name]}' for name in _SETTINGS if name in os.environ),
        f'torch {torch.__version__}', f'timm {timm.__version__}', f'timm_smpconv {__version__}',
        f'Python {platform.python_version()}']
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        parts.append(f'{torch.cuda.get_device_name()} of compute capability {major}.{minor}')
    return ', '.join(parts)


def _processor() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
    except OSError:  # not Linux
        lines = []
    names = dict.fromkeys(line.split(':', 1)[1].strip() for line in lines if line.startswith('model name'))
    return ', '.join(names) or platform.processor() or platform.machine()


def rates() -> str:
    """One line on the rates that the expected times come from."""
    return 'ns for a unit of work: ' + ', '.join(f'{n} {v:.3g}' for n, v in costs.rates()._asdict().items())


def page(
        models: Sequence[str],
        image_size: Optional[int] = None,
        batch: Sequence[int] = (1,),
        channels_last: bool = False,
        dtype: torch.dtype = torch.float32,
        device: Optional[str] = None,
        measured: bool = False,
) -> Iterator[str]:
    """The lines that `timm-smpconv backends` prints.

    Args:
        models: Names.
        image_size: Height and width of the images, by default those of the model's configuration.
        batch: Sizes of the batch.
        channels_last: The memory format, contiguous otherwise.
        dtype: Of the input and the weight.
        device: 'cpu' or 'cuda', by default 'cuda' where there is a GPU.
        measured: Whether to time the backends.

    Raises:
        ValueError: An argument breaks a rule.
    """
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    if device == 'cuda' and not torch.cuda.is_available():
        raise ValueError("--device must be cpu where there is no CUDA GPU, got 'cuda'")
    tables = [
        (name, *_cases_of(name, image_size, sorted(set(batch)), channels_last, dtype, device))
        for name in dict.fromkeys(models)]
    yield machine()
    if device == 'cpu':
        yield rates()
        yield '* is taken, where the values allow fft; expected times are of the CPU that the rates were fitted on'
    elif not measured:
        yield (
            'taken without torch.backends.cudnn.benchmark; with it, as in timm\'s scripts, the first call of a shape '
            'times them: see --measure')
    results = []
    for name, size, found in tables:
        rows = measure_all(found) if measured else map(expect, found)
        for setting, group in itertools.groupby(rows, key=lambda result: result.case.setting):
            yield f'\n{name}, {size}×{size}, {setting}'
            yield header(measured, device)
            for result in group:
                yield row(result)
                results.append(result)
    if measured:
        yield ''
        yield from summary(results)


def _cases_of(
        name: str,
        image_size: Optional[int],
        batch: Sequence[int],
        channels_last: bool,
        dtype: torch.dtype,
        device: str,
) -> Tuple[int, List[Geometry]]:
    """The size of the images and the cases of a model by its name."""
    names = timm.list_models('smpconv*')
    if name not in names:
        raise ValueError(f'MODEL must be one of {", ".join(names)}, got {name!r}')
    model = timm.create_model(name, device='meta')
    channels, *_, size = model.pretrained_cfg['input_size']  # type: ignore[index]
    size = image_size or size
    if not any(map(_has_backends, model.modules())):
        raise ValueError(f'MODEL must have large depthwise convolutions of stride 1, got {name!r}')
    try:
        return size, cases(model, (channels, size, size), batch, (channels_last,), dtype, device)
    except ValueError as error:
        raise ValueError(f'--image-size must fit {name}, got {size}: {error}') from error
