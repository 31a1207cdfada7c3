"""`--save SUBJECT`: adds what a benchmark prints to benchmarks/tables/SUBJECT.md, under its command and the date."""
import contextlib
import datetime
import io
import shlex
import sys
from pathlib import Path

TABLES = Path(__file__).parent / 'tables'


class _Both(io.StringIO):
    """Standard output that also keeps what is written."""

    def write(self, text):
        sys.__stdout__.write(text)
        sys.__stdout__.flush()
        return super().write(text)


@contextlib.contextmanager
def saving(subject):
    """Save what is printed in this block, unless the subject is None. A block that raises saves nothing."""
    output = _Both()
    with contextlib.redirect_stdout(output):
        yield
    if subject:
        with (TABLES / f'{subject}.md').open('a', encoding='utf-8') as file:
            file.write(
                f'\n## {datetime.date.today()}\n\n`python {shlex.join(sys.orig_argv[1:])}`\n\n'
                f'```\n{output.getvalue().strip()}\n```\n')


def add_option(parser):
    parser.add_argument('--save', metavar='SUBJECT', help='also add the output to benchmarks/tables/SUBJECT.md')
