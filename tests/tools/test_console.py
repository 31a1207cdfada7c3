"""Output whose reader has gone, or that knows ASCII only."""
import io
import os
import sys

from timm_smpconv.tools.console import robust_output


def test_a_reader_that_has_gone(monkeypatch, capfd):
    """As behind `| head -n 1`: what is written later is dropped, and nothing is left to flush at exit."""
    reader, writer = os.pipe()
    with os.fdopen(writer, 'w') as stream:
        monkeypatch.setattr(sys, 'stdout', stream)
        with robust_output():
            sys.stdout.write('first\n')
            assert os.read(reader, 100) == b'first\n'
            os.close(reader)
            for _ in range(3):
                sys.stdout.write('later\n')
        stream.write('at exit')
        stream.flush()
    assert capfd.readouterr() == ('', '')


def test_characters_that_an_encoding_lacks(monkeypatch):
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, 'stderr', io.TextIOWrapper(buffer, 'ascii'))
    with robust_output():
        sys.stderr.write('48×48 ' + os.fsdecode(b'\xff'))
        sys.stderr.write(' 48x48')
    assert buffer.getvalue() == '48×48 '.encode() + b'\xff 48x48'


def test_streams_come_back_and_keep_their_methods():
    before = sys.stdout, sys.stderr
    with robust_output():
        assert sys.stdout.fileno() == before[0].fileno() and sys.stdout.encoding == before[0].encoding
    assert (sys.stdout, sys.stderr) == before
