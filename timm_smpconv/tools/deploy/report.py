"""What the command writes beside the files: the table, `README.md` and `report.json`."""
from dataclasses import dataclass, field
from string import Template
from typing import Any, Dict, Iterator, Optional, Sequence

from .engines import ENGINES
from .engines.openvino import hint
from .network import Network

__all__ = ['Row', 'readme', 'table']


@dataclass
class Row:
    """A line of the table.

    Attributes:
        engine: A key of `ENGINES`, '' for the network as it was given.
        precision: 'float32', 'bfloat16' or 'int8'.
        file: Its name.
        megabytes: Of it, and of what belongs to it.
        off, same, top1, drop: See `verify.Found`.
        ms: Milliseconds for a batch of each size.
        why: Why there is no file or time.
        failed: Whether that is a fault.
    """
    engine: str
    precision: str
    file: str = ''
    megabytes: float = 0.
    off: Optional[float] = None
    same: Optional[float] = None
    top1: Optional[float] = None
    drop: float = 0.
    ms: Dict[int, float] = field(default_factory=dict)
    why: str = ''
    failed: bool = False

    @property
    def title(self) -> str:
        return ENGINES[self.engine].title if self.engine else 'PyTorch'


def table(rows: Sequence[Row], max_drop: float) -> str:
    """The table, and which file is the fastest."""
    batches = sorted({batch for row in rows for batch in row.ms})
    lines = [[
        'file', 'engine', 'precision', 'MB', 'outputs off', 'same class', 'top-1',
        *(f'ms, batch {batch}' if batch == 1 else f'images/s, {batch}' for batch in batches)]]
    for row in rows:
        if not row.why:
            lines.append(list(_figures(row, batches)))
        elif row.failed:
            lines.append([row.file, row.title, row.precision, row.why])
        else:  # of the ways of PyTorch and the precisions, a reason is told once
            group = row.title.split(',')[0]
            told = [other for other in rows if (other.title.split(',')[0], other.why) == (group, row.why)]
            titles, precisions = ({getattr(other, name) for other in told} for name in ('title', 'precision'))
            title, precision = row.title if len(titles) == 1 else group, row.precision if len(precisions) == 1 else '–'
            line = ['–', title, precision, row.why]
            lines += [line] if line not in lines else []
    widths = [max(len(line[i]) for line in lines if i < 3 or len(line) > 4) for i in range(len(lines[0]))]
    text = [
        '  '.join(cell.ljust(width) if i < 3 else cell.rjust(width) if len(line) > 4 else cell
                  for i, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in lines]
    for batch in batches:
        good = [row for row in rows if row.engine and not row.why and row.drop <= max_drop]
        if good:
            best = min(good, key=lambda row: row.ms[batch])
            text.append(f'fastest within --max-drop {max_drop:g}, batch {batch}: {best.file} ({best.title}, '
                        f'{best.precision})')
    return '\n'.join(text)


def _figures(row: Row, batches: Sequence[int]) -> Iterator[str]:
    yield from (row.file or '(not merged)', row.title, row.precision, f'{row.megabytes:.1f}')
    yield '–' if row.off is None else f'{row.off:.0e}'.replace('e-0', 'e-')
    yield '–' if row.same is None else f'{row.same:.1f} %'
    drop = f' ({0 - row.drop:+.1f})' if row.precision != 'float32' else ''
    yield '–' if row.top1 is None else f'{row.top1:.1f}{drop}'
    for batch in batches:
        yield f'{row.ms[batch]:.2f}' if batch == 1 else f'{1000 * batch / row.ms[batch]:.1f}'


def readme(network: Network, rows: Sequence[Row], text: str, machine: str) -> str:
    """`README.md`: the table, and the lines that load each file."""
    in_graph = network.preprocess == 'in-graph'
    create = ', '.join([f'"{network.model}"', *(f'{key}={value!r}' for key, value in network.arguments.items())])
    if network.task == 'features':
        create += ', features_only=True, feature_cls="getter"'
    module, _, function = network.model.partition(':')
    build = (f'timm.create_model({create})', 'import timm\nimport timm_smpconv') if not function else (
        f'{function}()', f'from {module} import {function}')
    parts = [
        f'# {network.model}\n',
        f'Written by `timm-smpconv deploy` with {", ".join(f"{k} {v}" for k, v in network.versions.items())}. '
        f'The weights have the sha256 {network.sha256}. `report.json` has all that is known of the files; ONNX and '
        'OpenVINO files hold it, too. `timm-smpconv deploy --check .` measures them again on another machine.\n',
        f'On {machine}:\n', f'```\n{text}\n```\n', '## An input\n', _python(_input(network))]
    for row in rows:
        if not row.engine or row.why:
            continue
        engine = ENGINES[row.engine]
        size = [1, *network.input_size]
        to = ['torch.bfloat16'] if row.precision == 'bfloat16' else []
        to += ['memory_format=torch.channels_last'] if network.data else []
        cast = f'.to({", ".join(to)})' if to else ''
        values = dict(
            file=row.file, weights=row.file.removesuffix('.param') + '.bin', hint=hint(row.precision),
            create=build[0], cast=cast, input_name=network.input_name,
            output_name=network.output_name, shape=', '.join(map(str, size)),
            type='uint8_t' if in_graph else 'float', count=' * '.join(map(str, size)))
        lines = Template(engine.python).substitute(values)
        if not engine.graph:
            normalized = ''
            if in_graph:
                mean, std = ([[[v]] for v in network.data[key]] for key in ('mean', 'std'))
                normalized = f'image = (image / 255 - torch.tensor({mean})) / torch.tensor({std})\n'
            lines = f'{build[1]}\n{normalized}{lines}'
        parts += [f'## {row.file}, {row.title}, {row.precision}\n', _python(lines)]
        if engine.cpp:
            parts.append(f'```cpp\n{Template(engine.cpp).substitute(values)}```\n')
    return '\n'.join(parts)


def _python(lines: str) -> str:
    return f'```python\n{lines}```\n'


def _input(network: Network) -> str:
    size = tuple(network.input_size)
    if not network.data:
        return f'import torch\n\nsequence = torch.randn{(1, *size)}\n'
    settings: Dict[str, Any] = dict(network.data)
    in_graph = network.preprocess == 'in-graph'
    if in_graph:
        settings['use_prefetcher'] = True  # pixels in uint8
    arguments = ', '.join(f'{key}={value!r}' for key, value in settings.items())
    pixels = 'torch.as_tensor(transform(photo))[None]' if in_graph else 'transform(photo)[None]'
    return f'''\
import torch
from PIL import Image
from timm.data import create_transform

transform = create_transform({size}, {arguments})
photo = Image.open("photo.png").convert("{'L' if size[0] == 1 else 'RGB'}")
image = {pixels}
'''
