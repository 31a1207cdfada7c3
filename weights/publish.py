"""Publishes a folder that convert.py wrote on the Hugging Face Hub.

    python weights/publish.py smpconv_tiny.in1k --repo-id timm-smpconv/smpconv_tiny.in1k

Creates the repository if it does not exist, uploads the folder, downloads it again and compares, and prints the commit
and, if sources.yaml lists the repository, the lines to put there. The token is the one of `hf auth login`, or HF_TOKEN.
"""
import argparse
import json
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Dict, List, Optional

from huggingface_hub import HfApi, constants, get_token, hf_hub_download
from huggingface_hub.utils import HFValidationError, validate_repo_id

sys.path.insert(0, str(Path(__file__).parent.parent))  # the package of this checkout
from timm_smpconv._errors import DataError
from timm_smpconv.tools.authors_weights.card import with_address
from timm_smpconv.tools.cli import status_of
from timm_smpconv.weights.hub import _CLIENT_ERRORS, FILES, SOURCES, _first_line, file_sha256, load_sources


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, metavar='DIR', help='a folder that convert.py wrote')
    parser.add_argument('--repo-id', required=True, metavar='ORG/NAME')
    parser.add_argument('--private', action='store_true', help='create a private repository')
    parser.add_argument('--revision', default='main', help='the branch; created if missing (%(default)s)')
    parser.add_argument('--dry-run', action='store_true', help='print what would be uploaded, and upload nothing')
    parser.add_argument('--sources', type=Path, default=SOURCES, help='the list of published weights (%(default)s)')
    args = parser.parse_args(argv)
    return status_of('publish', partial(run, args))


def run(args: argparse.Namespace) -> None:
    try:
        publish(args.folder, args.repo_id, args.private, args.revision, args.dry_run, args.sources)
    except (DataError, ValueError):
        raise
    except _CLIENT_ERRORS as error:
        raise DataError(f'the request to {constants.ENDPOINT} failed: {_first_line(error)}') from error


def publish(folder: Path, repo_id: str, private: bool, revision: str, dry_run: bool, sources: Path) -> None:
    """See the top of this file; the arguments are those of the command line."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f'--repo-id must be ORG/NAME, got {repo_id!r}: {error}') from error
    if repo_id.count('/') != 1:
        raise ValueError(f'--repo-id must be ORG/NAME, got {repo_id!r}')
    name = check_folder(folder, repo_id, sources)
    with tempfile.TemporaryDirectory() as staging:
        try:
            for file in FILES:
                shutil.copy(folder / file, staging)
            card = Path(staging, 'README.md')
            card.write_text(with_address(card.read_text(encoding='utf-8'), repo_id), encoding='utf-8')
            hashes = {file: file_sha256(Path(staging, file)) for file in FILES}
        except UnicodeDecodeError as error:
            raise DataError(f'README.md in DIR must be UTF-8, got {folder}: {error}') from error
        for file, sha256 in hashes.items():
            print(f'{Path(staging, file).stat().st_size:>12,} bytes  {sha256}  {file}')
        if dry_run:
            print(f'would be uploaded to {constants.ENDPOINT}/{repo_id}, revision {revision}; nothing was uploaded')
            return
        api = HfApi()
        check_rights(api, repo_id)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise ValueError(f'--repo-id must be a private or new repository, got {repo_id}, which is public')
        if revision != 'main':
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        try:
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=staging, revision=revision,
                commit_message=f'Weights of sha256 {hashes["model.safetensors"][:8]}').oid
        except ValueError as error:
            raise DataError(
                'README.md must be a model card that the Hub accepts; nothing was uploaded: '
                f'{_first_line(error)}') from error
    verify(repo_id, commit, hashes)
    print(f'{constants.ENDPOINT}/{repo_id}/tree/{commit}')
    if name is None or revision != 'main':
        print(f'{sources.name} does not list revision {revision} of {repo_id}')
        return
    sha256 = hashes['model.safetensors']
    print(f'now write these lines into the entry {name} of {sources}:\n  sha256: {sha256}\n  commit: {commit}')
    print(f'and this one into BUILT_IN in timm_smpconv/weights/hub.py:\n    {name!r}: {sha256!r},')


def check_folder(folder: Path, repo_id: str, sources: Path) -> Optional[str]:
    """The model.tag that sources.yaml lists for this repository, or None. A listed one must be that of the folder."""
    rule = f'DIR must be a folder that weights/convert.py wrote, got {folder}'
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise DataError(f'{rule} without {", ".join(missing)}')
    try:
        config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
        written = f'{config["architecture"]}.{config["pretrained_cfg"]["tag"]}'
        expected = config['origin']['file_sha256']
        merged = {**config['model_args']}.get('inference_mode', False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f'{rule} with another config.json: {type(error).__name__} {error}') from error
    if file_sha256(folder / 'model.safetensors') != expected:
        raise DataError(f'{rule} with a model.safetensors that does not match its config.json')
    for name, entry in load_sources(sources).items():
        if entry['hub_id'].casefold() != repo_id.casefold():  # else a slip of the case would miss it
            continue
        if entry['hub_id'] != repo_id:
            raise ValueError(f'--repo-id must be {entry["hub_id"]}, as listed in {sources.name}, got {repo_id}')
        if name != written or merged:
            raise DataError(f'DIR must hold {name}, unmerged, for --repo-id {repo_id}, got {folder} of {written}')
        return name
    return None


def check_rights(api: HfApi, repo_id: str) -> None:
    if get_token() is None:
        raise DataError('no token found: run `hf auth login` or set HF_TOKEN; nothing was created')
    try:
        user = api.whoami()
    except _CLIENT_ERRORS as error:
        if getattr(getattr(error, 'response', None), 'status_code', None) != 401:
            raise
        raise DataError(f'{constants.ENDPOINT} rejects the token; nothing was created') from error
    owner = repo_id.split('/')[0]
    if owner not in (user['name'], *(org['name'] for org in user.get('orgs', ()))):
        raise ValueError(
            f'--repo-id must belong to {user["name"]} or an organisation of theirs, got {repo_id}; nothing was created')
    if user.get('auth', {}).get('accessToken', {}).get('role') == 'read':
        raise DataError('the token must have write access, got a read-only one; nothing was created')


def verify(repo_id: str, commit: str, hashes: Dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as cache:
        for name, expected in hashes.items():
            found = file_sha256(Path(hf_hub_download(repo_id, name, revision=commit, cache_dir=cache)))
            if found != expected:
                raise DataError(f'{name} of {repo_id} at {commit} has sha256 {found}, but {expected} was uploaded')


if __name__ == '__main__':
    sys.exit(main())
