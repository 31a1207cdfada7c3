"""Google Drive on loopback: what gdown 6.4 and 6.5 meet when they download a public file.

Read from gdown's download.py, and from reports of what the drive answers (gdown's issues 26 and 224, for two):
- drive.google.com/uc?id=ID redirects to drive.usercontent.google.com/download
- a small file comes at once; before a large one there is a page with a form, `download-form`, whose hidden fields have
  to be sent: the file was not scanned for viruses
- files have Content-Disposition, Content-Length and Last-Modified, and take Range with If-Range
- too many downloads: a page with `uc-error-subcaption`; a file that is not public: a redirect to a page to sign in

The client insists on https and these hosts. So this is a proxy, which HTTPS_PROXY names: it answers CONNECT itself,
with certificates of an authority that REQUESTS_CA_BUNDLE names. Nothing in gdown is replaced.
Unsupported: folders, documents, accounts, cookies.
"""
import contextlib
import itertools
import re
import ssl
import threading
from dataclasses import dataclass
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import trustme

HOSTS = ('drive.google.com', 'docs.google.com', 'drive.usercontent.google.com', 'accounts.google.com')
QUOTA = (
    'Too many users have viewed or downloaded this file recently. Please try accessing the file again later.')
MODIFIED = 'Sat, 01 Apr 2023 12:00:00 GMT'


@dataclass
class File:
    """A file of the drive.

    `state` is what the drive does when it is asked for it: 'public' sends it; the others are in `Handler.page`.
    """
    data: bytes
    large: bool = False
    state: str = 'public'
    ranges: bool = True  # whether a part of it can be asked for


class Handler(BaseHTTPRequestHandler):
    """One connection of the client: CONNECT, then TLS, then requests to one of HOSTS."""
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True
    host = None

    def log_message(self, *args):
        pass

    def do_CONNECT(self):
        self.host = self.path.partition(':')[0]
        if self.host not in HOSTS:
            self.send_error(502)
            return
        self.send_response(200)
        self.end_headers()
        try:
            self.connection = self.server.drive.context.wrap_socket(self.connection, server_side=True)
        except OSError:
            self.close_connection = True
            return
        self.rfile, self.wfile = self.connection.makefile('rb'), self.connection.makefile('wb', 0)
        self.close_connection = False

    def do_GET(self):
        drive = self.server.drive
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        drive.requests.append((self.host, url.path, self.headers.get('Range')))
        file = drive.files.get(query.get('id'))
        if self.host == 'drive.google.com' and url.path == '/uc' and file and file.state != 'sign-in':
            target = f'https://drive.usercontent.google.com/download?id={query["id"]}&export=download'
            self.answer(303, b'', {'Location': target})
        elif self.host == 'accounts.google.com':
            self.answer(200, b'<html><title>Sign in</title><form id="gaia_loginform"></form></html>')
        elif file is None:
            self.answer(404, b'<html><title>Error 404 (Not Found)!!1</title></html>')
        elif file.state == 'sign-in':
            self.answer(302, b'', {'Location': 'https://accounts.google.com/v3/signin?continue=drive'})
        else:
            page = self.page(file, query)
            self.answer(*page) if page else self.send(file)

    def page(self, file, query):
        """Status, body and headers of what the drive shows instead of the file, or None."""
        drive = self.server.drive
        if file.state == 'busy':
            return 503, b'<html><title>Service Unavailable</title></html>', {'Content-Disposition': 'attachment'}
        if file.state == 'changed':
            return 200, b'<html><title>Google Drive</title><button>Download anyway</button></html>'
        if file.state == 'formless':
            return 200, b'<html><form id="download-form"><input type="submit"></form></html>'
        confirmed = query.get('confirm') == 't' and query.get('uuid') in drive.forms
        if (file.large and not confirmed) or file.state == 'asks again':
            drive.forms.append(f'0b1c2d3e-{next(drive.numbers):04}')
            fields = {'id': query['id'], 'export': 'download', 'confirm': 't', 'uuid': drive.forms[-1]}
            inputs = ''.join(f'<input type="hidden" name="{key}" value="{value}">' for key, value in fields.items())
            return 200, (
                '<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head><body>'
                '<p class="uc-warning-caption">Google Drive can\'t scan this file for viruses.</p>'
                '<form id="download-form" action="https://drive.usercontent.google.com/download" method="get">'
                f'<input type="submit" value="Download anyway"/>{inputs}</form></body></html>').encode()
        if file.state == 'quota':
            return 200, (
                '<html><head><title>Google Drive - Quota exceeded</title></head><body>\n<p class="uc-error-caption">'
                f'Sorry.</p>\n<p class="uc-error-subcaption">{escape(QUOTA)}</p>\n</body></html>').encode()
        return None

    def send(self, file):
        """The file, or the rest of it that Range names."""
        drive = self.server.drive
        total, begin = len(file.data), 0
        wanted = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
        headers = {
            'Content-Type': 'application/octet-stream', 'Last-Modified': MODIFIED,
            'Content-Disposition': 'attachment; filename="file.pth"; filename*=UTF-8\'\'file.pth'}
        if wanted and file.ranges and self.headers.get('If-Range', MODIFIED) == MODIFIED:
            begin = int(wanted[1])
            if begin >= total:
                self.answer(416, b'', {**headers, 'Content-Range': f'bytes */{total}'})
                return
            headers['Content-Range'] = f'bytes {begin}-{total - 1}/{total}'
        body = file.data[begin:]
        self.head(206 if begin else 200, len(body), headers)
        fault = drive.faults.pop(0) if drive.faults else None
        with contextlib.suppress(OSError):  # the client has gone
            self.wfile.write(body[:fault[0]] if fault else body)
        if fault:
            drive.reached.set()
            if fault[1] and fault[1]() is not False:
                with contextlib.suppress(OSError):
                    self.wfile.write(body[fault[0]:])
            self.close_connection = True

    def answer(self, status, body, headers=None):
        self.head(status, len(body), {'Content-Type': 'text/html; charset=utf-8', **(headers or {})})
        self.wfile.write(body)

    def head(self, status, length, headers):
        self.send_response(status)
        for key, value in {'Content-Length': length, **headers}.items():
            self.send_header(key, str(value))
        self.end_headers()

    def finish(self):
        with contextlib.suppress(OSError):
            super().finish()
        self.connection.close()


class DriveServer:
    """`with DriveServer(folder) as drive:` serves `drive.files`, id → File, to processes with `drive.environment()`.

    Attributes:
        requests: (host, path, Range or None) of each.
        faults: What happens to the next answers with a file, in their order: None, or (bytes, function). After as many
            bytes the connection ends; a function is called before, and the rest is sent unless it returns False.
        reached: An event, set when a fault is reached.
    """
    def __init__(self, folder: Path):
        self.folder = folder
        self.files, self.requests, self.faults, self.forms = {}, [], [], []
        self.numbers = itertools.count()
        self.reached = threading.Event()

    def __enter__(self):
        authority = trustme.CA()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(*HOSTS).configure_cert(self.context)
        self.bundle = self.folder / 'authority.pem'
        authority.cert_pem.write_to_path(str(self.bundle))
        self.listener = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.listener.drive = self
        threading.Thread(target=self.listener.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.listener.shutdown()
        self.listener.server_close()

    def environment(self):
        """For a process that shall take this for the drive, and reach nothing else by https."""
        proxy = f'http://127.0.0.1:{self.listener.server_port}'
        return {
            'HTTPS_PROXY': proxy, 'https_proxy': proxy, 'NO_PROXY': '127.0.0.1', 'no_proxy': '127.0.0.1',
            'REQUESTS_CA_BUNDLE': str(self.bundle)}

    def sent(self):
        """Range, or None, of each request that a file answered or would have."""
        return [
            wanted for host, path, wanted in self.requests if host == 'drive.usercontent.google.com']
