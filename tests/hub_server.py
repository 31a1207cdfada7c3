"""A Hugging Face Hub on loopback: the part of its protocol that huggingface_hub 0.26 and 2.4 use for models.

Read from these files of huggingface_hub:
- hf_api.py: whoami, create_repo, model_info, list_repo_tree, create_branch, _validate_yaml (repocard.py sends the same)
- _commit_api.py: preupload, which says what is large, and commit, one JSON object per line
- lfs.py: the batch, upload and verify requests of git-lfs, transfer "basic"
- file_download.py: HEAD and GET of /resolve/, and the headers it needs
- utils/_http.py: X-Error-Code and X-Error-Message, which become exceptions

The Hub and its store of large files are two hosts, so this server opens two ports. On a single host the client would
follow the redirect to the store and miss the headers of the Hub's own response. Like the real store, this one rejects
tokens.
Of datasets it serves files only. Unsupported: spaces, tags, copies, deletions, pull requests, gated repositories,
paging, parts of files, and Xet. Where hf_xet is installed, the client uploads with Xet whatever a server offers;
`environment` disables that.
Stricter than the Hub: a model card without a YAML header is an error here and a warning there.
"""
import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

LARGE = ('*.bin', '*.ckpt', '*.npz', '*.onnx', '*.pt', '*.pth', '*.safetensors')  # and all above 10 MB
LICENSES = (  # those of the Hub's list that a model is likely to have
    'afl-3.0', 'agpl-3.0', 'apache-2.0', 'bsd-2-clause', 'bsd-3-clause', 'cc-by-4.0', 'cc-by-nc-4.0', 'cc-by-nc-sa-4.0',
    'cc-by-sa-4.0', 'cc0-1.0', 'gpl-2.0', 'gpl-3.0', 'isc', 'lgpl-3.0', 'mit', 'mpl-2.0', 'other', 'unknown')


class Problem(Exception):
    """A response of status 400 or above."""
    def __init__(self, status, message, code=None, headers=(), **body):
        line = message.partition('\n')[0].encode('ascii', 'replace').decode()
        headers = {'X-Error-Code': code, 'X-Error-Message': line, **dict(headers)}
        self.answer = status, headers, {'error': message, **body}


@dataclass
class Fault:
    method: str
    path_part: str
    times: int
    status: int


@dataclass(frozen=True)
class File:
    """A file of a commit. The oid is the hash of its content: sha256 for a large file, else git's sha1."""
    oid: str
    size: int
    large: bool

    def entry(self, path):
        """The Hub's description of it."""
        entry = {'type': 'file', 'path': path, 'size': self.size, 'oid': self.oid}
        if self.large:
            pointer = f'version https://git-lfs.github.com/spec/v1\noid sha256:{self.oid}\nsize {self.size}\n'.encode()
            entry['lfs'] = {'oid': self.oid, 'sha256': self.oid, 'size': self.size, 'pointerSize': len(pointer)}
            entry['oid'] = blob_oid(pointer)
        return entry


@dataclass
class Commit:
    title: str
    parent: str
    files: dict  # path -> File


@dataclass
class Repository:
    private: bool
    contents: dict = field(default_factory=dict)  # oid -> bytes
    commits: dict = field(default_factory=dict)  # sha -> Commit
    branches: dict = field(default_factory=dict)  # name -> sha

    def store(self, data, large):
        file = File(hashlib.sha256(data).hexdigest() if large else blob_oid(data), len(data), large)
        self.contents[file.oid] = data
        return file

    def commit(self, branch, title, files):
        """Create a commit of exactly these files, changed or not; it becomes the head of the branch."""
        commit = Commit(title, self.branches.get(branch), files)
        sha = self.branches[branch] = hashlib.sha1(f'{len(self.commits)} {commit}'.encode()).hexdigest()
        self.commits[sha] = commit
        return sha

    def sha(self, revision):
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise Problem(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return sha

    def files(self, revision):
        return self.commits[self.sha(revision)].files

    def entries(self, revision):
        """The Hub's description of each file and folder, by path."""
        entries = {path: file.entry(path) for path, file in self.files(revision).items()}
        for path in list(entries):
            while path := path.rpartition('/')[0]:
                entries[path] = {'type': 'directory', 'path': path, 'size': 0, 'oid': blob_oid(path.encode())}
        return entries


def blob_oid(data):
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


def card_error(text):
    """Why the header of a model card is invalid, or None."""
    header = re.match(r'---[ \t]*\r?\n(.*?)^---[ \t]*$', text, re.DOTALL | re.MULTILINE)
    try:
        data = yaml.safe_load(header[1]) if header else None
    except yaml.YAMLError as error:
        return f'The YAML header is invalid: {error}'
    if not isinstance(data, dict):
        return 'The YAML header is missing, or not a mapping'
    names = data.get('license', [])
    unknown = [name for name in (names if isinstance(names, list) else [names]) if name not in LICENSES]
    return f'"license" must be one of {", ".join(LICENSES)}, not {unknown[0]}' if unknown else None


class Handler(BaseHTTPRequestHandler):
    """One connection: reads requests, sends the hub's responses, and applies the faults that a test asked for."""
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        self.server.hub.connections.add(self.connection)

    def finish(self):
        self.server.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, *args):
        pass

    def do(self):
        hub, url = self.server.hub, urlsplit(self.path)
        self.route, self.query, path = url.path, parse_qs(url.query), unquote(url.path)
        self.body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        with hub.lock:
            try:
                status, headers, body = hub.answer(self, hub.fault(self.command, path))
            except Problem as problem:
                status, headers, body = problem.answer
            hub.requests.append((self.command, path, status))
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        request_id = self.headers.get('X-Request-Id') or self.headers.get('X-Amzn-Trace-Id')
        self.send_response(status)
        for key, value in {'Content-Length': len(body), **headers, 'X-Request-Id': request_id}.items():
            if value is not None:
                self.send_header(key, str(value))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = do


class HubServer:
    """`with HubServer(tokens) as server:` serves `server.url`.

    Args:
        tokens: The owner of each token: `{'hf_writer': {'name': 'alice', 'orgs': ['timm'], 'role': 'write'}}` may read
            the private repositories of alice and timm and, because of its role, write there.
    """
    def __init__(self, tokens=()):
        self.tokens = dict(tokens)
        self.lock = threading.RLock()
        self.repositories = {}  # name -> Repository
        self.requests = []  # (method, path, status), in the order of the responses
        self.faults = []
        self.connections = set()

    def __enter__(self):
        self.listeners = [ThreadingHTTPServer(('127.0.0.1', 0), Handler) for _ in range(2)]
        self.url, self.store_url = (f'http://127.0.0.1:{listener.server_port}' for listener in self.listeners)
        for listener in self.listeners:
            listener.hub = self
            threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.stop()

    def stop(self):
        """Close the ports, and the connections that clients keep alive."""
        for listener in self.listeners:
            listener.shutdown()
            listener.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):  # the client closed it first
                connection.shutdown(socket.SHUT_RDWR)

    def environment(self, token=None):
        """Environment variables that point the client of another process here."""
        env = {'HF_ENDPOINT': self.url, 'HF_HUB_DISABLE_XET': '1', 'NO_PROXY': '127.0.0.1'}
        return dict(env, HF_TOKEN=token) if token else env

    def exists(self, repo):
        return repo in self.repositories

    def files(self, repo, revision='main'):
        """Path -> bytes, as served."""
        with self.lock:
            repository = self.repositories[repo]
            return {path: repository.contents[file.oid] for path, file in repository.files(revision).items()}

    def count(self, method, path_part):
        """Count requests. The client downloads from '/resolve/', and large files from '/cdn/'."""
        return sum(seen[0] == method and path_part in seen[1] for seen in list(self.requests))

    def fail(self, method, path_part, status, times=1):
        """Respond to the next matching requests with this status."""
        with self.lock:
            self.faults.append(Fault(method, path_part, times, status))

    def repair(self):
        """Cancel the remaining failures."""
        with self.lock:
            self.faults.clear()

    def fault(self, method, path):
        for fault in self.faults:
            if fault.times and fault.method == method and fault.path_part in path:
                fault.times -= 1
                return fault
        return None

    def answer(self, request, fault):
        """Status, headers and body: bytes, or an object to be sent as JSON."""
        token = request.headers.get('Authorization', '').removeprefix('Bearer ')
        if fault:
            raise Problem(fault.status, 'A test asked for this')
        if token and token not in self.tokens:
            raise Problem(401, 'Invalid credentials in Authorization header')
        request.user = self.tokens.get(token)
        for method, pattern, handler in ROUTES:
            match = re.fullmatch(pattern, request.route)
            if match and request.command in method.split():
                return handler(self, request, **{key: unquote(value) for key, value in match.groupdict('').items()})
        raise Problem(404, f'Unsupported: {request.command} {request.route}')

    def signed_in(self, request):
        if request.user is None:
            raise Problem(401, 'Invalid username or password.')
        return request.user

    def owns(self, user, owner):
        return owner in (user['name'], *user.get('orgs', ()))

    def repository(self, request, name, write=False):
        repository, user = self.repositories.get(name), request.user
        if user is None and (repository is None or repository.private or write):
            raise Problem(401, 'Invalid username or password.', 'RepoNotFound')  # nor does the Hub say which
        mine = user is not None and self.owns(user, name.split('/')[0])
        if repository is None or (repository.private and not mine):
            raise Problem(404, 'Repository not found', 'RepoNotFound')
        if write and not (mine and user['role'] == 'write'):
            raise Problem(403, 'This token may not write to this repository')
        return repository

    def whoami(self, request):
        user = self.signed_in(request)
        orgs = [{'type': 'org', 'name': name} for name in user.get('orgs', ())]
        auth = {'type': 'access_token', 'accessToken': {'displayName': 'test', 'role': user['role']}}
        return 200, {}, {'type': 'user', 'name': user['name'], 'orgs': orgs, 'auth': auth}

    def create(self, request):
        user, data = self.signed_in(request), json.loads(request.body)
        owner = data.get('organization') or user['name']
        name, url = f'{owner}/{data["name"]}', f'{self.url}/{owner}/{data["name"]}'
        if not (self.owns(user, owner) and user['role'] == 'write'):
            raise Problem(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        if name in self.repositories:
            raise Problem(409, 'You already created this model repo', url=url)
        # 0.26 sends `private`, 2.4 `visibility`.
        repository = Repository(bool(data.get('private')) or data.get('visibility') == 'private')
        attributes = ''.join(f'{pattern} filter=lfs diff=lfs merge=lfs -text\n' for pattern in LARGE)
        repository.commit('main', 'initial commit', {'.gitattributes': repository.store(attributes.encode(), False)})
        self.repositories[name] = repository
        return 201, {}, {'url': url, 'name': name}

    def validate_card(self, request):
        error = card_error(json.loads(request.body)['content'])
        if error:
            raise Problem(400, error, errors=[{'message': error}], warnings=[])
        return 200, {}, {'errors': [], 'warnings': []}

    def info(self, request, repo, revision='main'):
        repository = self.repository(request, repo)
        siblings = [{'rfilename': path} for path in sorted(repository.files(revision))]
        data = {'id': repo, 'sha': repository.sha(revision), 'private': repository.private, 'siblings': siblings}
        return 200, {}, data

    def tree(self, request, repo, revision):
        entries = self.repository(request, repo).entries(revision)
        recursive = request.query.get('recursive', [''])[0].lower() in ('true', '1')
        return 200, {}, [entries[path] for path in sorted(entries) if recursive or '/' not in path]

    def create_branch(self, request, repo, name):
        repository, start = self.repository(request, repo, write=True), json.loads(request.body).get('startingPoint')
        if name in repository.branches:
            raise Problem(409, f'Reference already exists: {name}')
        repository.branches[name] = repository.sha(start or 'main')
        return 201, {}, {}

    def preupload(self, request, repo, revision):
        files, answer = self.repository(request, repo, write=True).files(revision), []
        for file in json.loads(request.body)['files']:
            large = file['size'] > 10_000_000 or any(fnmatch(file['path'], pattern) for pattern in LARGE)
            answer.append({'path': file['path'], 'uploadMode': 'lfs' if large else 'regular', 'shouldIgnore': False})
            if file['path'] in files:
                answer[-1]['oid'] = files[file['path']].oid
        return 200, {}, {'files': answer}

    def batch(self, request, repo):
        contents = self.repository(request, repo, write=True).contents
        objects = [{'oid': item['oid'], 'size': item['size']} for item in json.loads(request.body)['objects']]
        for item in objects:
            if item['oid'] not in contents:
                item['actions'] = {'upload': {'href': f'{self.store_url}/lfs/{repo}/{item["oid"]}/{item["size"]}'},
                                   'verify': {'href': f'{self.url}/{repo}.git/info/lfs/objects/verify'}}
        return 200, {}, {'transfer': 'basic', 'objects': objects}

    def upload(self, request, repo, oid, size):
        self.refuse_token(request)
        if (hashlib.sha256(request.body).hexdigest(), str(len(request.body))) != (oid, size):
            raise Problem(400, 'The content does not match its sha256 or size')
        self.repositories[repo].store(request.body, large=True)
        return 200, {}, b''

    def verify(self, request, repo):
        data = json.loads(request.body)
        if len(self.repository(request, repo, write=True).contents.get(data['oid'], b'')) != data['size']:
            raise Problem(404, 'The object was not uploaded')
        return 200, {}, {}

    def commit(self, request, repo, revision):
        repository = self.repository(request, repo, write=True)
        if revision not in repository.branches:
            raise Problem(404, f'Not a branch: {revision}', 'RevisionNotFound')
        files = dict(repository.files(revision))
        for line in map(json.loads, request.body.splitlines()):
            key, value = line['key'], line['value']
            if key == 'header':
                title = value['summary']
            elif key == 'file':
                files[value['path']] = repository.store(base64.b64decode(value['content']), large=False)
            elif key == 'lfsFile':
                if value['oid'] not in repository.contents:
                    raise Problem(400, f'LFS pointer pointed to a file that does not exist: {value["path"]}')
                files[value['path']] = File(value['oid'], value['size'], large=True)
            else:
                raise Problem(400, f'Unsupported: {key}')
        sha = repository.commit(revision, title, files)
        return 200, {}, {'success': True, 'commitOid': sha, 'commitUrl': f'{self.url}/{repo}/commit/{sha}'}

    def resolve(self, request, repo, revision, path):
        repository = self.repository(request, repo)
        headers = {'X-Repo-Commit': repository.sha(revision)}
        file = repository.files(revision).get(path)
        if file is None:
            raise Problem(404, 'Entry not found', 'EntryNotFound', headers)
        if file.large:
            headers['Location'] = f'{self.store_url}/cdn/{repo}/{file.oid}/{quote(path)}'
            return 302, {**headers, 'X-Linked-Etag': f'"{file.oid}"', 'X-Linked-Size': file.size}, b''
        headers['ETag'] = f'"{file.oid}"'
        if request.command == 'HEAD':
            return 200, {**headers, 'Content-Length': file.size}, b''
        return 200, headers, repository.contents[file.oid]

    def download(self, request, repo, oid, path):
        self.refuse_token(request)
        return 200, {'ETag': f'"{oid}"'}, self.repositories[repo].contents[oid]

    def refuse_token(self, request):
        if 'Authorization' in request.headers:
            raise Problem(400, 'Only one auth mechanism allowed')


REPO, REVISION = r'(?P<repo>[^/]+/[^/]+)', r'(?P<revision>[^/]+)'
ROUTES = (
    ('GET', '/api/whoami-v2', HubServer.whoami),
    ('POST', '/api/repos/create', HubServer.create),
    ('POST', '/api/validate-yaml', HubServer.validate_card),
    ('GET', f'/api/models/{REPO}', HubServer.info),
    ('GET', f'/api/models/{REPO}/revision/{REVISION}', HubServer.info),
    ('GET', f'/api/models/{REPO}/tree/{REVISION}', HubServer.tree),
    ('POST', f'/api/models/{REPO}/branch/(?P<name>[^/]+)', HubServer.create_branch),
    ('POST', f'/api/models/{REPO}/preupload/{REVISION}', HubServer.preupload),
    ('POST', f'/api/models/{REPO}/commit/{REVISION}', HubServer.commit),
    ('POST', rf'/{REPO}\.git/info/lfs/objects/batch', HubServer.batch),
    ('POST', rf'/{REPO}\.git/info/lfs/objects/verify', HubServer.verify),
    ('PUT', f'/lfs/{REPO}/(?P<oid>[^/]+)/(?P<size>[0-9]+)', HubServer.upload),
    ('GET HEAD', f'/(?:datasets/)?{REPO}/resolve/{REVISION}/(?P<path>.+)', HubServer.resolve),
    ('GET HEAD', f'/cdn/{REPO}/(?P<oid>[^/]+)/(?P<path>.+)', HubServer.download),
)
