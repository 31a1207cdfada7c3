"""`timm-smpconv deploy`: merge, export, quantise, compare, measure, report.

Each file is written and compared in a folder beside its place. It is then renamed to its name, or to its name with the
suffix `.wrong`. `check` renames nothing: what is wrong on one machine may be right on another.
"""
import errno
import json
import logging
import shutil
import warnings
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Dict, Generator, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from safetensors.torch import save
from tqdm import tqdm

from ..._errors import DataError, one_line
from ..._files import written_beside
from ...ops.dispatch.timing import timing
from ...weights.checkpoint import read_checkpoint
from ..backend_report import machine
from . import verify
from .data import Inputs, read_data, samples
from .engines import ENGINES, PRECISIONS
from .network import Network, Outputs, Run, Source, count_convolutions, runner
from .report import Row, readme, table

__all__ = ['Options', 'check', 'deploy']

KEPT = 200e6  # bytes of inputs and outputs that stay for `--check`: 1,000 images of 224×224
ROUNDS, SECONDS = 15, 60  # of timing
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)

Runs = Dict[int, Run]  # by the size of the batch


class Options(NamedTuple):
    """How files are compared and measured.

    Attributes:
        batch: Sizes of the batch.
        tolerance: The largest difference of outputs in float32, relative to the largest.
        max_drop: How much less accurate another precision may be, in percent.
    """
    batch: Sequence[int]
    tolerance: float
    max_drop: float


class Test(NamedTuple):
    """What files are compared with.

    Attributes:
        network: What they hold.
        inputs: The inputs.
        expected: The outputs of the network as it was given.
        convolutions: Of the merged graph, None if it could not be exported.
    """
    network: Network
    inputs: Inputs
    expected: Outputs
    convolutions: Optional[int]

    def prepared(self, x: torch.Tensor, engine: str) -> torch.Tensor:
        """Inputs as an engine takes them."""
        in_graph = engine and ENGINES[engine].graph and self.network.preprocess == 'in-graph'
        return x if in_graph else self.network.normalize(x)

    def outputs(self, run: Run, engine: str, batch: int, count: int) -> Outputs:
        """What an engine returns for the first inputs."""
        return verify.outputs(lambda x: run(self.prepared(x, engine)), self.inputs.x[:count], batch)


def deploy(
        network: Network,
        reference: nn.Module,
        merged: nn.Module,
        out: Path,
        options: Options,
        engines: Sequence[str],
        precisions: Sequence[str],
        data: Optional[Path],
        calibration: int,
        limit: Optional[int],
) -> Tuple[str, Dict[str, Any]]:
    """Write the files of a network, and the report on them.

    Args:
        network: The description of the network, see `read_network`.
        reference: The network as it was given.
        merged: The merged network.
        out: A folder, created if missing. What is in it stays, unless a new file has its name.
        options: See `Options`.
        engines: Of `ENGINES`, or what comes before a hyphen there: 'torch' means five.
        precisions: Of `PRECISIONS`.
        data: Images, see `read_data`.
        calibration: How many of them to calibrate with.
        limit: How many of them to measure on.

    Returns:
        The table, and what `report.json` holds.

    Raises:
        ValueError: An argument breaks a rule.
        OSError: A file cannot be written. Those that are finished stay.
    """
    rows = [
        Row(key, precision, ENGINES[key].file(precision)) for key in ENGINES for precision in PRECISIONS
        if precision in precisions and any(f'{key}-'.startswith(f'{name}-') for name in engines)]
    traced = next(size for size in range(2, 5000) if size not in options.batch)
    source = Source(network, merged, traced, options.max_drop)
    with _quiet(), tqdm(total=len(rows) + 2, unit='row') as bar:
        bar.set_description('reference')
        given = runner(reference)
        test = _prepare(source, given, max(options.batch), data, calibration if 'int8' in precisions else 0, limit)
        runs: List[Runs] = [dict.fromkeys(options.batch, given)]
        done: Dict[str, Row] = {}
        for row in rows:
            bar.update()
            bar.set_description(f'{row.file}, {row.title}, {row.precision}')
            runs.append(_make(source, row, test, options, out, done))
        size = sum(t.numel() * t.element_size() for t in reference.state_dict().values()) / 1e6
        top1 = verify.hits(test.expected, test.inputs.labels, network.task)
        rows.insert(0, Row('', 'float32', megabytes=size, top1=top1))
        bar.update()
        bar.set_description('measuring')
        _measure(rows, runs, test, options)
        bar.update()
    report = {
        'network': test.network._asdict(), 'machine': machine(), **options._asdict(),
        'convolutions': test.convolutions, 'own_images': test.inputs.own, 'images': len(test.inputs.x),
        'rows': [asdict(row) for row in rows]}
    text = table(rows, options.max_drop)
    with written_beside(out) as new:
        (new / 'check.safetensors').write_bytes(save(_kept(test)))
        (new / 'report.json').write_text(json.dumps(report, indent=1))
        (new / 'README.md').write_text(readme(test.network, rows, text, machine()), encoding='utf-8')
    return text, report


def _prepare(
        source: Source,
        given: Run,
        batch: int,
        data: Optional[Path],
        calibration: int,
        limit: Optional[int],
) -> Test:
    """What files are compared with. Gives the source its images, and its network the names of its classes.

    Without `calibration` nothing is quantised.
    """
    network = source.network
    if data is None:
        inputs = samples(network)
    else:
        limit = limit or (1000 if network.task == 'classification' else 64)
        images, inputs, classes = read_data(data, network, calibration or 1, limit)
        network = source.network = network._replace(classes=classes or network.classes)
        source.calibration = images if network.preprocess == 'in-graph' else network.normalize(images)
    try:
        expected = verify.outputs(lambda x: given(network.normalize(x)), inputs.x, batch)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f'the network must take inputs of {tuple(network.input_size)}, which --image-size changes, got: '
            f'{_short(error)}') from error
    if not expected or (network.task != 'features' and expected[0].ndim < 2):
        raise ValueError(
            f'the network must return tensors (B, classes) or maps, got {[tuple(t.shape) for t in expected]}')
    count = max(2, expected[0].shape[1])  # one output tells two classes apart
    if inputs.labels is not None and len(network.classes) != count:
        raise ValueError(
            f'--data must have a folder for each of the {count} classes of the network, got {len(network.classes)}')
    try:
        convolutions = count_convolutions(source.program('float32'))
    except Exception:  # the engines that need the graph say why
        convolutions = None
    test = Test(network, inputs, expected, convolutions)
    targets = verify.classes(expected, network.task) if inputs.labels is None else inputs.labels
    if calibration and data is not None and targets is not None:
        source.validation = list(zip(test.prepared(inputs.x, 'torch-export').split(1), targets.split(1)))
    return test


def _kept(test: Test) -> Dict[str, torch.Tensor]:
    """Inputs and outputs for `check`, evenly spaced, since folders are sorted by class."""
    (x, labels, _), expected = test.inputs, test.expected
    count = min(len(x), max(1, int(KEPT // sum(t[:1].numel() * t.element_size() for t in (x, *expected)))))
    kept = torch.arange(count) * len(x) // count
    found = {'inputs': x[kept], **{f'output_{i}': t[kept].contiguous() for i, t in enumerate(expected)}}
    return found if labels is None else {**found, 'labels': labels[kept]}


def check(folder: Path, batch: Optional[Sequence[int]]) -> Tuple[str, Dict[str, Any]]:
    """Compare and measure the files of a folder again, on this machine.

    Args:
        folder: As `deploy` wrote it.
        batch: Sizes of the batch, by default those of the report.

    Returns:
        The table, and a report on this machine.

    Raises:
        DataError: The folder holds no report.
    """
    try:
        report = json.loads((folder / 'report.json').read_text())
        stored = dict(read_checkpoint(folder / 'check.safetensors'))
        network = Network(**report['network'])
        old = [Row(**row) for row in report['rows'] if row['engine'] and not row['why']]
    except (DataError, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f'--check must be a folder that `timm-smpconv deploy` wrote, got {folder}: {error}') from error
    options = Options(batch or report['batch'], report['tolerance'], report['max_drop'])
    inputs = Inputs(stored.pop('inputs'), stored.pop('labels', None), report['own_images'])
    expected = tuple(stored[f'output_{i}'] for i in range(len(stored)))
    test = Test(network, inputs, expected, report['convolutions'])
    rows = [Row(row.engine, row.precision, row.file, row.megabytes) for row in old]
    runs: List[Runs] = []
    with _quiet(), tqdm(rows, unit='row') as bar:
        for row in bar:
            bar.set_description(f'{row.file}, {row.title}, {row.precision}')
            row.why = ENGINES[row.engine].unsupported(network, row.precision) or ''
            runs.append({} if row.why else _examine(row, folder / row.file, test, options))
        _measure(rows, runs, test, options)
    report.update(machine=machine(), **options._asdict(), rows=[asdict(row) for row in rows])
    return table(rows, options.max_drop), report


def _make(source: Source, row: Row, test: Test, options: Options, out: Path, done: Dict[str, Row]) -> Runs:
    """Write the file of a row and compare it. `done` has the first row of each file, which later rows share."""
    engine = ENGINES[row.engine]
    row.why = engine.unsupported(source.network, row.precision) or ''
    if row.why:
        return {}
    first = done.setdefault(row.file, row)
    if first is not row:
        row.megabytes = first.megabytes
        if first.failed:
            row.file, row.why, row.failed = first.file, first.why, True
            return {}
        return _examine(row, out / row.file, test, options)
    try:
        with written_beside(out) as new:
            engine.write(source, 'float32' if row.file == engine.file('float32') else row.precision, new / row.file)
            row.megabytes = sum(path.stat().st_size for path in new.rglob('*')) / 1e6
            runs = _examine(row, new / row.file, test, options)
            if row.failed:
                _mark_wrong(row, new, out)
            else:
                _remove(out, [f'{name}.wrong' for name in _names(row)])
            return runs
    except Exception as error:  # exporters and compilers raise anything
        if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
            raise
        row.why, row.failed = f'not written: {_short(error)}', True
        _remove(out, _names(row))
        return {}


def _examine(row: Row, file: Path, test: Test, options: Options) -> Runs:
    """Compare a file with the reference, at every size of the batch. Fills the row."""
    engine, task = ENGINES[row.engine], test.network.task
    try:
        if not file.exists():
            raise DataError(f'there is no {file.name}')
        load = partial(engine.load, test.network, file, row.precision)
        runs = {batch: load(batch) for batch in options.batch} if engine.fixes_batch else dict.fromkeys(
            options.batch, load(max(options.batch)))
        if engine.convolutions and test.convolutions is not None:
            count = engine.convolutions(file)
            if count > test.convolutions:
                raise DataError(f'not merged: {count} convolutions, {test.convolutions} in the merged network')
        found = None
        for batch in sorted(options.batch, reverse=True):
            count = len(test.inputs.x) if found is None else min(batch, len(test.inputs.x))
            labels = test.inputs.labels if found is None else None
            try:
                actual = test.outputs(runs[batch], row.engine, batch, count)
            except Exception as error:
                raise DataError(f'batch {batch}: {_short(error)}') from error
            part = verify.compare(actual, tuple(t[:count] for t in test.expected), labels, task)
            found = part if found is None else found._replace(off=max(found.off, part.off))
    except Exception as error:  # engines raise anything
        row.why, row.failed = f'wrong: {_short(error)}', True
        return {}
    assert found is not None
    row.off, row.same, row.top1, row.drop = found
    reason = verify.wrong(found, row.precision, test.inputs.own, options.tolerance, options.max_drop)
    if reason:
        row.why, row.failed = f'wrong: {reason}', True
    return runs


def _mark_wrong(row: Row, folder: Path, out: Path) -> None:
    """Give the file of a row, and its weights, the suffix `.wrong`. An earlier file that was right goes."""
    for name in _names(row):
        if (folder / name).exists():
            (folder / name).rename(folder / f'{name}.wrong')
    _remove(out, _names(row))
    row.file += '.wrong'


def _remove(folder: Path, names: Sequence[str]) -> None:
    """Delete earlier files, or folders, that are there."""
    for path in (folder / name for name in names):
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)


def _names(row: Row) -> List[str]:
    """A file, and what belongs to it."""
    file = Path(row.file)
    return [row.file, f'{file.stem}.bin'] if file.suffix in ('.xml', '.param') else [row.file]


def _measure(rows: Sequence[Row], runs: Sequence[Runs], test: Test, options: Options) -> None:
    """Time the files that are right, in turns."""
    for batch in options.batch:
        x = test.inputs.x[torch.arange(batch) % len(test.inputs.x)]
        good = {str(i): i for i, row in enumerate(rows) if not row.why}
        times = timing(
            {name: partial(runs[i][batch], test.prepared(x, rows[i].engine)) for name, i in good.items()},
            rounds=ROUNDS, warmup=1, seconds=SECONDS)
        for name, i in good.items():
            rows[i].ms[batch] = times[name]


@contextmanager
def _quiet() -> Generator[None, None, None]:
    """Exporters and quantisers warn of what the comparison decides."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(level)


def _short(error: Exception) -> str:
    return ('' if isinstance(error, DataError) else f'{type(error).__name__}: ') + one_line(error, 200)
