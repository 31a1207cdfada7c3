"""A folder that convert.py wrote, published on the Hugging Face Hub:

    python weights/publish.py smpconv_tiny.in1k --repo-id timm-smpconv/smpconv_tiny.in1k

Creates the repository if there is none, uploads, downloads what was uploaded and compares it, prints the commit, and
records it in sources.yaml if that lists this repository. The token is that of `hf auth login`, or HF_TOKEN.
"""
import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Dict, List, Optional

from card import with_address
from huggingface_hub import HfApi, constants, get_token, hf_hub_download
from huggingface_hub.utils import HfHubHTTPError, HFValidationError, validate_repo_id
from sources import FILES, SOURCES, file_sha256, load_sources, record

# The client's own, its HTTP library's, which depends on its version, and those of hf_xet.
_CLIENT_ERRORS = (OSError, RuntimeError, *HfHubHTTPError.__bases__)


class PublishError(Exception):
    """An argument, the token or what came back is not what it has to be."""


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, metavar='DIR', help='that convert.py wrote')
    parser.add_argument('--repo-id', required=True, metavar='ORG/NAME')
    parser.add_argument('--private', action='store_true', help='create the repository for those only who are allowed')
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
        print(f'publish: {constants.ENDPOINT} did not do it: {_first_line(error)}', file=sys.stderr)
        return 1
    return 0


def publish(folder: Path, repo_id: str, private: bool, revision: str, dry_run: bool, sources: Path) -> None:
    """See the top of this file; the arguments are those of the command line."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishError(f'--repo-id must be ORG/NAME, got {repo_id!r}: {error}') from error
    if repo_id.count('/') != 1:
        raise PublishError(f'--repo-id must be ORG/NAME, got {repo_id!r}')
    name = check_folder(folder, repo_id, sources)
    with tempfile.TemporaryDirectory() as staging:
        for file in FILES:
            shutil.copy(folder / file, staging)
        card = Path(staging, 'README.md')
        card.write_text(with_address(card.read_text(), repo_id))
        hashes = {file: file_sha256(Path(staging, file)) for file in FILES}
        for file, sha256 in hashes.items():
            print(f'{Path(staging, file).stat().st_size:>12,} bytes  {sha256}  {file}')
        if dry_run:
            print(f'would go to {constants.ENDPOINT}/{repo_id}, revision {revision}; nothing was done')
            return
        api = HfApi()
        check_rights(api, repo_id)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise PublishError(f'--private must name a private repository or a new one, got {repo_id}, which is public')
        if revision != 'main':
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        try:
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=staging, revision=revision,
                commit_message=f'Weights of sha256 {hashes["model.safetensors"][:8]}').oid
        except ValueError as error:
            raise PublishError(
                'README.md must be a model card that the Hub accepts; nothing was uploaded: '
                f'{_first_line(error)}') from error
    verify(repo_id, commit, hashes)
    print(f'{constants.ENDPOINT}/{repo_id}/tree/{commit}')
    if name is None or revision != 'main':
        print(f'not recorded: {sources.name} lists no weights at revision {revision} of {repo_id}')
        return
    try:
        record(sources, name, {'sha256': hashes['model.safetensors'], 'commit': commit})
    except OSError as error:
        raise PublishError(f'it is published, but --sources could not be written: {error}') from error
    print(f'recorded in {sources}; now put the line into BUILT_IN of timm_smpconv/pretrained.py:\n'
          f'    {name!r}: {hashes["model.safetensors"]!r},')


def check_folder(folder: Path, repo_id: str, sources: Path) -> Optional[str]:
    """The model.tag of the weights that sources.yaml lists at this repository, which have to be these, or None."""
    rule = f'DIR must be a folder that weights/convert.py wrote, got {folder}'
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise PublishError(f'{rule} without {", ".join(missing)}')
    try:
        config = json.loads((folder / 'config.json').read_text())
        written = f'{config["architecture"]}.{config["pretrained_cfg"]["tag"]}'
        expected = config['origin']['file_sha256']
    except (ValueError, KeyError, TypeError) as error:
        raise PublishError(f'{rule} with another config.json: {type(error).__name__} {error}') from error
    if file_sha256(folder / 'model.safetensors') != expected:
        raise PublishError(f'{rule} with a model.safetensors that is not the one of its config.json')
    try:
        entries = load_sources(sources)
    except OSError as error:
        raise PublishError(f'--sources must be a file that can be read, got {sources}: {error}') from error
    name = next((name for name, entry in entries.items() if entry['hub_id'] == repo_id), None)
    if name and (name != written or config.get('model_args', {}).get('inference_mode')):
        raise PublishError(
            f'--repo-id {repo_id} is the place of {name}, unmerged; got a folder of other weights: {folder}')
    return name


def check_rights(api: HfApi, repo_id: str) -> None:
    if get_token() is None:
        raise PublishError('there is no token: run `hf auth login`, or set HF_TOKEN; nothing was created')
    try:
        user = api.whoami()
    except _CLIENT_ERRORS as error:
        if getattr(getattr(error, 'response', None), 'status_code', None) != 401:
            raise
        raise PublishError(f'{constants.ENDPOINT} does not accept the token; nothing was created') from error
    owner = repo_id.split('/')[0]
    if owner not in (user['name'], *(org['name'] for org in user.get('orgs', ()))):
        raise PublishError(
            f'--repo-id must be of {user["name"]} or an organisation of theirs, got {repo_id}; nothing was created')
    if user.get('auth', {}).get('accessToken', {}).get('role') == 'read':
        raise PublishError('the token may only read: make one that may write; nothing was created')


def verify(repo_id: str, commit: str, hashes: Dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as cache:
        for name, expected in hashes.items():
            found = file_sha256(hf_hub_download(repo_id, name, revision=commit, cache_dir=cache))
            if found != expected:
                raise PublishError(f'{name} of {repo_id} at {commit} has sha256 {found}, but {expected} was uploaded')


def _first_line(error: Exception) -> str:
    return f'{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}'


if __name__ == '__main__':
    sys.exit(main())
