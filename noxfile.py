"""The checks of `.ci/run`, and those that do not fit into it. CONTRIBUTING.md says when to run which.

Sessions other than `tests` also run in an environment that is there: `nox --no-venv -s lint`.
"""
import sys
from pathlib import Path
from typing import Any, List

import nox

PYTHONS = ['3.11', '3.12', '3.13', '3.14']
CPUS = ['avx512', 'avx2', 'neither']  # of tests/conftest.py
CPU_TESTS = ['tests/ops', 'tests/surgery/test_prepack.py', 'tests/tools/test_backends.py']  # where the CPU decides

nox.options.default_venv_backend = 'uv'  # a second environment with torch takes seconds and no space
nox.options.error_on_missing_interpreters = False  # such a session is skipped, and nox says so
nox.options.sessions = ['lint', 'types', 'cpu']


def install(session: nox.Session, *args: str) -> None:
    """`session.install`, nothing with `--no-venv`."""
    if session.venv_backend != 'none':
        session.install(*args)


def run(session: nox.Session, program: str, *args: str, **kwargs: Any) -> None:
    """`session.run`; with `--no-venv` the program beside the Python that runs nox, which need not be on the path."""
    if session.venv_backend == 'none':
        program = str(Path(sys.executable).with_name(program))
    session.run(program, *args, external=True, **kwargs)


def lower_bounds() -> List[str]:
    """The lower bounds of the package's dependencies, and of torchaudio, as exact versions."""
    project = nox.project.load_toml('pyproject.toml')['project']
    dependencies = [*project['dependencies'], *project['optional-dependencies']['sequences']]
    return [dependency.replace('>=', '==') for dependency in dependencies if '>=' in dependency]


@nox.session(python=PYTHONS)
@nox.parametrize('versions', [nox.param('lowest', id='lowest'), nox.param('newest', id='newest')])
def tests(session: nox.Session, versions: str) -> None:
    """The default tests on one Python, with the lowest supported or the newest releases of everything."""
    session.install('-e', '.[test]', *(lower_bounds() if versions == 'lowest' else []))
    run(session, 'pytest', '-n', '2', *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff."""
    install(session, '-e', '.[dev]')
    run(session, 'ruff', 'check')


@nox.session
def types(session: nox.Session) -> None:
    """mypy."""
    install(session, '-e', '.[dev]')
    run(session, 'mypy')


@nox.session
@nox.parametrize('cpu', [nox.param(cpu, id=cpu) for cpu in CPUS])
def cpu(session: nox.Session, cpu: str) -> None:
    """The tests that depend on the CPU, on one kind of CPU whatever this one is."""
    install(session, '-e', '.[test]')
    run(session, 'pytest', '-n', '2', *(session.posargs or CPU_TESTS), env={'TIMM_SMPCONV_TEST_CPU': cpu})


@nox.session
def docs(session: nox.Session) -> None:
    """Every command and every snippet of README and docs."""
    install(session, '-e', '.[test]')
    run(session, 'pytest', '-n', '2', '-m', 'slow or not slow', 'tests/test_docs.py', *session.posargs)


@nox.session
def slow(session: nox.Session) -> None:
    """Whole models, whole round trips, other programs."""
    install(session, '-e', '.[test]')
    run(session, 'pytest', '-n', '2', '--dist', 'loadgroup', '-m', 'slow', '--durations', '20', *session.posargs)
