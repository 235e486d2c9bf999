"""Names of checkpoints: folders here, and repositories of the Hub."""

import os

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .confine import CheckpointError


def require_folder_or_repository(name: str) -> None:
    """
    Raises:
        CheckpointError: if there is no folder of a name, and no repository can have it: it has no user, or is a path such as `./name`.
    """
    if not os.path.isdir(name):
        try:
            validate_repo_id(name)
            is_repository = "/" in name
        except HFValidationError:
            is_repository = False
        if not is_repository:
            raise CheckpointError(f"There is no folder {name}, and a Hub repository is written user/name.")


def require_repository(name: str) -> None:
    """
    Raises:
        CheckpointError: if a repository cannot have this name.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise CheckpointError(f"{name!r} is no name of a repository, such as user/name.") from error
