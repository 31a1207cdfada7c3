"""A folder that convert.py wrote, published on the Hugging Face Hub:

    python weights/publish.py smpconv_tiny.in1k --repo-id timm-smpconv/smpconv_tiny.in1k

Creates the repository if there is none, uploads, downloads what was uploaded and compares it, prints the commit, and records
it in sources.yaml if that lists this repository. The token is that of `hf auth login`, or HF_TOKEN.
"""
import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Dict, List, Optional

from card import with_address
from huggingface_hub import HfApi, constants, get_token, hf_hub_download
from huggingface_hub.utils import HfHubHTTPError, HFValidationError, validate_repo_id
from sources import FILES, SOURCES, file_sha256, load_sources, record

_CLIENT_ERRORS = (OSError, *HfHubHTTPError.__bases__)  # the latter are of its HTTP library, which depends on its version


class PublishError(Exception):
    """An argument, the token or what came back is not what it has to be."""


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, metavar='DIR', help='that convert.py wrote')
    parser.add_argument('--repo-id', required=True, metavar='ORG/NAME')
    parser.add_argument('--private', action='store_true', help='of a repository that is created: only for those allowed')
    parser.add_argument('--revision', default='main', help='the branch, created if there is none (%(default)s)')
    parser.add_argument('--dry-run', action='store_true', help='say what would be uploaded, and do nothing')
    parser.add_argument('--sources', type=Path, default=SOURCES, help='where to record it (%(default)s)')
    args = parser.parse_args(argv)
    try:
        publish(args.folder, args.repo_id, args.private, args.revision, args.dry_run, args.sources)
    except PublishError as error:
        print(f'publish: {error}', file=sys.stderr)
        return 1
    except _CLIENT_ERRORS as error:
        print(f'publish: {constants.ENDPOINT} did not do it: {str(error).strip()}', file=sys.stderr)
        return 1
    return 0


def publish(folder: Path, repo_id: str, private: bool, revision: str, dry_run: bool, sources: Path) -> None:
    """See the top of this file; the arguments are those of the command line."""
    hashes = check_folder(folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishError(f'--repo-id must be ORG/NAME, got {repo_id!r}: {error}') from error
    if repo_id.count('/') != 1:
        raise PublishError(f'--repo-id must be ORG/NAME, got {repo_id!r}')
    for name in FILES:
        print(f'{(folder / name).stat().st_size:>12,} bytes  {hashes[name]}  {name}')
    if dry_run:
        print(f'would go to {constants.ENDPOINT}/{repo_id}, revision {revision}; nothing was done')
        return
    api = HfApi()
    check_rights(api, repo_id)
    card = folder / 'README.md'
    card.write_text(with_address(card.read_text(), repo_id))
    hashes[card.name] = file_sha256(card)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision != 'main':
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=folder, revision=revision, allow_patterns=list(FILES),
        commit_message=f'Weights of sha256 {hashes["model.safetensors"][:8]}').oid
    verify(repo_id, commit, hashes)
    print(f'{constants.ENDPOINT}/{repo_id}/tree/{commit}')
    record_it(sources, folder, repo_id, revision, commit, hashes['model.safetensors'])


def check_folder(folder: Path) -> Dict[str, str]:
    """The sha256 of each file."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise PublishError(f'DIR must be a folder that weights/convert.py wrote, got {folder} without {", ".join(missing)}')
    return {name: file_sha256(folder / name) for name in FILES}


def check_rights(api: HfApi, repo_id: str) -> None:
    if get_token() is None:
        raise PublishError('there is no token: run `hf auth login`, or set HF_TOKEN; nothing was created')
    try:
        user = api.whoami()
    except _CLIENT_ERRORS as error:
        raise PublishError(f'{constants.ENDPOINT} does not accept the token; nothing was created: {error}') from error
    owner = repo_id.split('/')[0]
    if owner not in (user['name'], *(org['name'] for org in user.get('orgs', ()))):
        raise PublishError(f'--repo-id must be of {user["name"]} or an organisation of theirs, got {repo_id}; nothing was created')
    if user.get('auth', {}).get('accessToken', {}).get('role') == 'read':
        raise PublishError('the token may only read: make one that may write; nothing was created')


def verify(repo_id: str, commit: str, hashes: Dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as cache:
        for name, expected in hashes.items():
            found = file_sha256(hf_hub_download(repo_id, name, revision=commit, cache_dir=cache))
            if found != expected:
                raise PublishError(f'{name} of {repo_id} at {commit} has sha256 {found}, but {expected} was uploaded')


def record_it(sources: Path, folder: Path, repo_id: str, revision: str, commit: str, sha256: str) -> None:
    config = json.loads((folder / 'config.json').read_text())
    name = f'{config["architecture"]}.{config["pretrained_cfg"]["tag"]}'
    entry = load_sources(sources).get(name)
    if entry is None or entry['hub_id'] != repo_id or revision != 'main':
        print(f'not recorded: {sources.name} lists no weights at revision {revision} of {repo_id}')
        return
    values = {'sha256': sha256, 'commit': commit}
    if entry['origin'] and config['origin']['authors']:
        values['origin.sha256'] = config['origin']['sha256']
    record(sources, name, values)
    print(f'recorded in {sources}; now put the line into SHA256 of timm_smpconv/pretrained.py:\n    {name!r}: {sha256!r},')


if __name__ == '__main__':
    sys.exit(main())
