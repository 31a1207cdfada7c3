"""Publishes weights on the Hugging Face Hub. Shows what it would upload, and uploads with --upload only.

    python weights/publish.py --all --org ORG            the authors' weights, as they are and merged
    python weights/publish.py DIR --repo-id ORG/NAME     a folder that convert.py wrote

--all downloads the authors' files, converts and verifies them into the folder --work, where the next call finds what it
downloaded. With --upload it creates ORG/smpconv_tiny.in1k, ORG/smpconv_tiny.in1k-merged and so on, and records hashes
and commits in sources.yaml: packages that are built with it load these weights for `pretrained=True`. Every upload is
downloaded again and compared. The token is the one of `hf auth login`, or HF_TOKEN.
"""
import argparse
import hashlib
import json
import re
import sys
import tempfile
from contextlib import contextmanager
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Any, Dict, Generator, List, Mapping, NamedTuple, Optional, Union

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token, hf_hub_download
from huggingface_hub.utils import HFValidationError, validate_repo_id

sys.path.insert(0, str(Path(__file__).parent.parent))  # the package of this checkout
from card import with_address
from convert import FILES, convert

from timm_smpconv._errors import DataError
from timm_smpconv._files import written_beside
from timm_smpconv.tools.cli import status_of
from timm_smpconv.weights import hub


class Upload(NamedTuple):
    """What goes to a repository.

    Attributes:
        repo_id: ORG/NAME.
        files: Name → content, or where it is.
        hashes: Name → sha256.
    """
    repo_id: str
    files: Dict[str, Union[bytes, Path]]
    hashes: Dict[str, str]


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('folder', type=Path, nargs='?', metavar='DIR', help='a folder that convert.py wrote')
    what.add_argument('--all', action='store_true', help="all of the authors' weights")
    what.add_argument('--only', nargs='+', metavar='NAME', help='some of them, such as smpconv_tiny.in1k')
    parser.add_argument('--repo-id', metavar='ORG/NAME', help='where to publish DIR')
    parser.add_argument('--org', help="where to publish the authors' weights")
    parser.add_argument('--upload', action='store_true', help='upload, instead of only showing what would be uploaded')
    parser.add_argument('--private', action='store_true', help='create private repositories')
    parser.add_argument('--revision', default='main', help='the branch for DIR; created if missing (%(default)s)')
    parser.add_argument(
        '--work', type=Path, default=Path('authors-weights'), metavar='WORK',
        help='folder for downloads and conversions (%(default)s)')
    args = parser.parse_args(argv)
    wanted = 'repo_id' if args.folder else 'org'
    if getattr(args, wanted) is None:
        parser.error(f'--{wanted.replace("_", "-")} is required with {"DIR" if args.folder else "--all and --only"}')
    if args.org if args.folder else args.repo_id or args.revision != 'main':
        parser.error('--repo-id and --revision go with DIR, --org goes with --all and --only')
    return status_of('publish', partial(run, args))


def run(args: argparse.Namespace) -> None:
    if args.folder:
        check_rights([args.repo_id], args.upload)
        item = planned(args.folder, args.repo_id)
        show([item], args.revision)
        if args.upload:
            publish(item, args.private, args.revision)
    else:
        publish_authors(args.org, None if args.all else args.only, args.work, args.upload, args.private)
    if not args.upload:
        print('nothing was uploaded; --upload does it')


@contextmanager
def asks_the_hub() -> Generator[None, None, None]:
    """Tell in one sentence what the Hub's client raises."""
    try:
        yield
    except (DataError, ValueError):
        raise
    except hub._CLIENT_ERRORS as error:
        raise DataError(f'the request to {constants.ENDPOINT} failed: {hub._first_line(error)}') from error


def publish_authors(org: str, names: Optional[List[str]], work: Path, upload: bool, private: bool) -> None:
    """Download, convert, verify, show and, with `upload`, publish and record; all of the weights if `names` is None."""
    listed = {name: entry for name, entry in hub.load_sources().items() if entry['origin']}
    unknown = [name for name in names or () if name not in listed]
    if unknown:
        raise ValueError(f'--only must name some of {", ".join(listed)}, got {unknown[0]}')
    names = names or list(listed)
    check_rights([f'{org}/{name}' for name in names], upload)
    work.mkdir(parents=True, exist_ok=True)
    uploads: List[Upload] = []
    origins = {}
    for name in names:
        file = work / f'{name}.pth'
        try:
            hub.download_authors(name, file)
        except DataError as error:
            raise DataError(f'{error}, and publish.py from {file}') from error
        origins[name] = {'bytes': file.stat().st_size, 'sha256': hub.file_sha256(file)}
        known = {key: value for key, value in listed[name]['origin'].items() if key in origins[name] and value}
        if not known.items() <= origins[name].items():
            raise DataError(f'{file} must have {known}, as recorded in {hub.SOURCES.name}, got {origins[name]}')
        model, _, tag = name.partition('.')
        for written in convert(file, model, work / name, tag, merged=True, downloaded=True):
            print(f'{written.folder}: logits differ by {written.difference:.1e} relative')
            uploads.append(planned(written.folder, f'{org}/{written.folder.name}'))
    show(uploads)
    for item in uploads if upload else ():
        commit = publish(item, private)
        name = item.repo_id.partition('/')[2]
        if name in origins:  # not merged: the weights that `pretrained=True` takes
            record(
                name, origins[name], {'hub_id': item.repo_id, 'commit': commit, 'sha256': item.hashes[hub.FILE]})


def planned(folder: Path, repo_id: str) -> Upload:
    """What would be uploaded of a folder, if convert.py wrote it."""
    rule = f'DIR must be a folder that weights/convert.py wrote, got {folder}'
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise DataError(f'{rule} without {", ".join(missing)}')
    files: Dict[str, Union[bytes, Path]] = {name: folder / name for name in FILES}
    hashes = {name: hub.file_sha256(folder / name) for name in FILES}
    try:
        expected = json.loads((folder / 'config.json').read_text(encoding='utf-8'))['origin']['file_sha256']
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f'{rule} with another config.json: {type(error).__name__} {error}') from error
    if hashes[hub.FILE] != expected:
        raise DataError(f'{rule} with a {hub.FILE} that does not match its config.json')
    try:
        card = with_address((folder / 'README.md').read_text(encoding='utf-8'), repo_id).encode()
    except UnicodeDecodeError as error:
        raise DataError(f'README.md in DIR must be UTF-8, got {folder}: {error}') from error
    files['README.md'], hashes['README.md'] = card, hashlib.sha256(card).hexdigest()
    return Upload(repo_id, files, hashes)


@asks_the_hub()
def check_rights(repo_ids: List[str], upload: bool) -> None:
    """Refuse names that the Hub does not take and, before an upload, a token that may not write there."""
    for repo_id in repo_ids:
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise ValueError(f'the repository must be ORG/NAME, got {repo_id!r}: {error}') from error
        if repo_id.count('/') != 1:
            raise ValueError(f'the repository must be ORG/NAME, got {repo_id!r}')
    if not upload:
        return
    if get_token() is None:
        raise DataError('no token found: run `hf auth login` or set HF_TOKEN; nothing was created')
    try:
        user = HfApi().whoami()
    except hub._CLIENT_ERRORS as error:
        if getattr(getattr(error, 'response', None), 'status_code', None) != 401:
            raise
        raise DataError(f'{constants.ENDPOINT} rejects the token; nothing was created') from error
    owner = repo_ids[0].split('/')[0]
    if owner not in (user['name'], *(org['name'] for org in user.get('orgs', ()))):
        raise ValueError(
            f'the owner must be {user["name"]} or an organisation of theirs, got {owner}; nothing was created')
    if user.get('auth', {}).get('accessToken', {}).get('role') == 'read':
        raise DataError('the token must have write access, got a read-only one; nothing was created')


def show(uploads: List[Upload], revision: str = 'main') -> None:
    for item in uploads:
        print(f'{constants.ENDPOINT}/{item.repo_id}, revision {revision}:')
        for name, content in item.files.items():
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            print(f'{size:>12,} bytes  {item.hashes[name]}  {name}')


@asks_the_hub()
def publish(item: Upload, private: bool, revision: str = 'main') -> str:
    """Upload, download again and compare. Returns the commit."""
    api = HfApi()
    api.create_repo(item.repo_id, private=private, exist_ok=True)
    if private and not api.model_info(item.repo_id).private:
        raise ValueError(f'the repository must be private or new, got {item.repo_id}, which is public')
    if revision != 'main':
        api.create_branch(item.repo_id, branch=revision, exist_ok=True)
    try:
        commit: str = api.create_commit(
            item.repo_id, list(starmap(CommitOperationAdd, item.files.items())),
            commit_message=f'Weights of sha256 {item.hashes[hub.FILE][:8]}', revision=revision).oid
    except ValueError as error:
        raise DataError(
            f'README.md must be a model card that the Hub accepts; nothing was uploaded to {item.repo_id}: '
            f'{hub._first_line(error)}') from error
    with tempfile.TemporaryDirectory() as cache:
        for name, expected in item.hashes.items():
            found = hub.file_sha256(Path(hf_hub_download(item.repo_id, name, revision=commit, cache_dir=cache)))
            if found != expected:
                raise DataError(f'{name} of {item.repo_id} at {commit} has sha256 {found}, but {expected} was uploaded')
    print(f'uploaded and compared: {constants.ENDPOINT}/{item.repo_id}/tree/{commit}')
    return commit


def record(name: str, origin: Mapping[str, Any], published: Mapping[str, Any]) -> None:
    """Write values into an entry of sources.yaml, whose other lines and comments stay."""
    text = hub.SOURCES.read_text(encoding='utf-8')
    start = f'\n{text}'.index(f'\n{name}:\n')
    end = next((found.start() for found in re.finditer(r'^\S', text, re.MULTILINE) if found.start() > start), len(text))
    entry = text[start:end]
    for indent, values in ((4, origin), (2, published)):
        for key, value in values.items():
            # Quoted: a hash of digits alone would be read as a number.
            entry = re.sub(rf'^( {{{indent}}}{key}: )\S+', rf'\g<1>{json.dumps(value)}', entry, flags=re.MULTILINE)
    with written_beside(hub.SOURCES.parent) as folder:
        (folder / hub.SOURCES.name).write_text(text[:start] + entry + text[end:], encoding='utf-8')
    print(f'recorded in {hub.SOURCES}: {name}, {dict(published)}')


if __name__ == '__main__':
    sys.exit(main())
