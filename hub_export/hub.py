"""The Hub: sources named by repository instead of by path, and the finished checkpoint pushed."""

import fnmatch
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import (
    HfApi,
    HfFileSystem,
    hf_hub_download,
    is_offline_mode,
    parse_hf_uri,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..locks import alone
from .atomic import write_json
from .card import rewrite_card
from .checkpoint import RECORD_NAME, read_record, require_files
from .confine import CheckpointError, inside, read_json, reading, require_no_links
from .names import require_folder_or_repository

if TYPE_CHECKING:
    from .plan import ExportSources

CONFIGURATIONS = ["config.json", "generation_config.json", "tokenizer_config.json", "preprocessor_config.json"]
CONFIGURATIONS += ["tokenizer.model", "vocab.json", "merges.txt"]
SAFETENSORS = ["model*.safetensors", "model.safetensors.index.json"]
PICKLES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


def fetch(sources: "ExportSources", headers: Path | None = None) -> "ExportSources":
    """
    The same sources, with every name of the Hub replaced by the path of its download in the Hub's cache.

    A folder is named `user/name` or `user/name@revision`, a file `hf://user/name/file` or `hf://user/name@revision/file`.

    Args:
        sources (`ExportSources`): Sources here or on the Hub.
        headers (`Path`, *optional*): A folder for sparse files that have the header and the size of the safetensors on the
            Hub, which are then not downloaded: enough for a plan. Offline the cache is used.

    Raises:
        CheckpointError: if something is neither here nor on the Hub, or may not be read.
    """
    found = {}
    for field in fields(sources):
        name = str(getattr(sources, field.name))
        is_folder = field.name in ("base", "vision")
        if is_folder and not name.startswith("hf://") and not os.path.exists(name):
            require_folder_or_repository(name.partition("@")[0])
            name = f"hf://{name}"
        if name.startswith("hf://"):
            try:
                uri = parse_hf_uri(name)
            except ValueError as error:
                raise CheckpointError(f"{name} is no name of the Hub: {error}.") from error
            if not is_folder:
                found[field.name] = fetch_file(uri)
            elif headers is None or is_offline_mode():
                found[field.name] = fetch_folder(uri)
            else:
                found[field.name] = fetch_headers(uri, headers / field.name)
    return replace(sources, **found)


def fetch_folder(uri) -> Path:
    """Downloads a model's configuration, tokenizer and weights: safetensors if it has them, else `.bin`."""
    with asking(uri.id):
        folder = Path(snapshot_download(uri.id, revision=uri.revision, allow_patterns=CONFIGURATIONS + SAFETENSORS))
        if not list(folder.glob("model*.safetensors")):
            snapshot_download(uri.id, revision=uri.revision, allow_patterns=CONFIGURATIONS + PICKLES)
    return folder


def fetch_headers(uri, folder: Path) -> Path:
    """Downloads a model's configuration and tokenizer, and only the headers of its safetensors if it has some."""
    with asking(uri.id):
        names = HfApi().list_repo_files(uri.id, revision=uri.revision)
        weights = [name for name in fnmatch.filter(names, SAFETENSORS[0]) if "/" not in name]
        if not weights:
            return fetch_folder(uri)
        folder.mkdir()
        for name in {*CONFIGURATIONS, *SAFETENSORS[1:]}.intersection(names):
            shutil.copyfile(hf_hub_download(uri.id, name, revision=uri.revision), folder / name)
        for name in weights:
            address = f"{uri.id}@{uri.revision}/{name}" if uri.revision else f"{uri.id}/{name}"
            with (
                HfFileSystem().open(address, block_size=2**16) as remote,
                open(inside(folder, name, uri.id), "wb") as file,
            ):
                length = remote.read(8)
                file.write(length + remote.read(int.from_bytes(length, "little")))
                file.truncate(remote.size)
    return folder


def fetch_file(uri) -> Path:
    with asking(uri.id):
        return Path(hf_hub_download(uri.id, uri.path_in_repo, revision=uri.revision))


def push(folder: Path, repository: str, public: bool = False, create_pr: bool = False) -> str:
    """
    Uploads the files that an export wrote, and no others that may lie beside them. What the Hub has already is not sent again, so
    that a broken upload goes on; weight files of another export that it has go.

    Args:
        folder (`Path`): The checkpoint.
        repository (`str`): `user/name`; made if it does not exist.
        public (`bool`, defaults to `False`): Whether a new repository can be seen by all.
        create_pr (`bool`, defaults to `False`): Whether to open a pull request instead of writing to the main branch.

    Returns:
        `str`: Where the upload can be seen.

    Raises:
        HealthGPTError: if another command changes the checkpoint.
        CheckpointError: if a file is missing or not in the folder itself, or the Hub refuses or cannot be reached.
    """
    folder = Path(folder)
    with alone(folder):
        return upload(folder, repository, public, create_pr)


def upload(folder: Path, repository: str, public: bool, create_pr: bool) -> str:
    """Uploads a checkpoint that nobody else changes; see [`push`]."""
    if not os.path.isdir(folder):
        raise CheckpointError(f"The folder {folder} does not exist.")
    require_no_links(folder)  # nor is anything uploaded through them
    record = read_record(folder)
    files = record["files"]
    require_files(folder, files)
    named = record | {"name": repository}
    from ..configuration_healthgpt import HealthGPTConfig

    with reading(folder):
        config = HealthGPTConfig.from_dict(read_json(folder / "config.json"))
        rewrite_card(folder, (config, record), (config, named))  # its snippet loads the repository
    write_json(folder / RECORD_NAME, named)
    with asking(repository):
        api = HfApi()
        api.create_repo(repository, private=not public, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=files,
            delete_patterns=SAFETENSORS,
            commit_message="HealthGPT checkpoint",
            create_pr=create_pr,
        )
    return commit.pr_url if create_pr else str(commit.repo_url)


@contextmanager
def asking(repository: str) -> Iterator[None]:
    """Turns what the Hub answers into one sentence."""
    reasons = {
        GatedRepoError: "its owner has not granted you access",
        RepositoryNotFoundError: "it does not exist, or your token may not read it",
        RevisionNotFoundError: "it has no such revision",
        LocalEntryNotFoundError: "the Hub cannot be reached, and the Hub's cache does not have it",
        EntryNotFoundError: "it has no such file",
    }
    try:
        yield
    except (OSError, EntryNotFoundError, HTTPError, RuntimeError) as error:
        # A failed upload, and a download that the cache cannot stand in for, have the Hub's answer behind them.
        answered = type(error) is LocalEntryNotFoundError and hasattr(error.__cause__, "response")
        cause = error.__cause__ if answered or (type(error) is RuntimeError and error.__cause__) else error
        reason = next((reason for kind, reason in reasons.items() if isinstance(cause, kind)), None)
        reason = reason or " ".join(str(cause).split()).rstrip(".") or type(cause).__name__
        raise CheckpointError(f"The Hub's repository {repository} cannot be used: {reason}.") from error
