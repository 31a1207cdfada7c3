"""What every command does with errors, interrupts, pipes and encodings."""
import os
import signal
import subprocess
import sys
from io import BytesIO, TextIOWrapper

import pytest

from timm_smpconv import CheckpointError, MergeError
from timm_smpconv._errors import DataError
from timm_smpconv.tools.cli import main, status_of
from timm_smpconv.training import recipes


def raises(error):
    def run():
        raise error
    return run


@pytest.mark.parametrize('error,status,said', [
    (ValueError('x must be\n  1, got 2'), 2, 'program: x must be 1, got 2\n'),
    (DataError('no'), 1, 'program: no\n'), (CheckpointError('no'), 1, 'program: no\n'),
    (MergeError('Conv2d', 'must be'), 1, 'program: Conv2d must be\n'),
    (FileNotFoundError(2, 'No such file', 'a'), 1, "program: [Errno 2] No such file: 'a'\n"),
    (KeyboardInterrupt(), 130, '\nprogram: interrupted\n'),
    (ModuleNotFoundError(name='lightning'), 1, 'program: lightning is missing; it comes with the extra "sequences"\n'),
], ids=repr)
def test_an_error_is_a_line_and_a_status(error, status, said, capsys):
    assert status_of('program', raises(error), extra='sequences') == status
    assert capsys.readouterr() == ('', said)


@pytest.mark.parametrize('error', [RuntimeError('a defect'), KeyError('a defect'), ModuleNotFoundError('a defect')])
def test_defects_keep_their_traceback(error):
    with pytest.raises(type(error), match='a defect'):
        status_of('program', raises(error))


@pytest.mark.parametrize('arguments', [
    ['picture', 'kernels', 'smpconv_tiny', '--checkpoint'], ['weights', 'smpconv_tiny', '--file']])
def test_a_damaged_checkpoint_has_one_status(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'damaged.pth').write_text('damaged')
    options = ['--cache-dir', 'cache'] if arguments[0] == 'weights' else []
    assert main([*arguments, 'damaged.pth', *options]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f'timm-smpconv {arguments[0]}') and 'must be an undamaged weights-only checkpoint' in error


@pytest.mark.parametrize('buffering', [0, -1])
def test_a_reader_that_leaves(buffering, monkeypatch, capsys):
    closed, pipe = os.pipe()
    os.close(closed)
    stdout = TextIOWrapper(os.fdopen(pipe, 'wb', buffering), write_through=not buffering)
    monkeypatch.setattr(sys, 'stdout', stdout)
    assert main(['recipe']) == 1
    stdout.close()  # as Python does at its end; raises if something is left to write
    assert capsys.readouterr().err == ''


def test_characters_that_standard_output_lacks(tmp_path, monkeypatch):
    folder = tmp_path / 'Rezepte für ImageNet'
    folder.mkdir()
    (folder / 'x.yaml').touch()
    monkeypatch.setattr(recipes, '_FOLDER', folder)
    monkeypatch.setattr(sys, 'stdout', TextIOWrapper(BytesIO(), encoding='ascii'))
    assert main(['recipe', 'x']) == 0
    assert sys.stdout.buffer.getvalue().endswith(b'Rezepte f\\xfcr ImageNet/x.yaml\n')


def test_ctrl_c_ends_a_process_without_traceback():
    code = '''
import signal, sys
from timm_smpconv.tools import cli
cli.recipe_names = lambda: signal.raise_signal(signal.SIGINT)
sys.exit(cli.main(["recipe"]))
'''
    process = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # in the background shells ignore it
    assert (process.returncode, process.stdout, process.stderr) == (130, '', '\ntimm-smpconv recipe: interrupted\n')
