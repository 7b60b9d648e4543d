"""Models of the Hugging Face hub, by name, such as xlnet/xlnet-base-cased."""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from support import UserError, warn

# Patterns are whole file names. They do not match files of the same name in a model's folders, such as onnx/.
SMALL_FILES = [
    "config.json",
    "spiece.model",
    "vocab.txt",
    "tokenizer_config.json",
    "tokenizer.json",
]
WEIGHTS = ["model.safetensors", "pytorch_model.bin"]  # the first one that a model has is read
POSSIBLE_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?(@\S+)?", re.ASCII)
EXAMPLE = "xlnet/xlnet-base-cased"
TIMEOUT = 10  # seconds until the list of files must arrive; the client has its own limits for files


class NoConnection(Exception):
    """The hub does not answer, or its answer breaks off; the text gives the reason."""


def fetch(name: str, flag: str, check: Callable[[str], object] | None = None) -> str:
    """Download a model's files that the cache of huggingface_hub lacks, and return their folder.

    Only the files that this project reads are downloaded. Without a connection the cached copy is used, with a warning.
    Several processes may fetch the same model at once: the client locks each file, and one of them downloads it.

    name: a name at the hub, as in xlnet/xlnet-base-cased; name@revision asks for a branch, a tag or a whole commit hash
    flag: the flag that has this value, for messages
    check: called with the folder before the weights are downloaded; it raises UserError if the model is not wanted
    Raises UserError if there is no such model, if it cannot be downloaded, or if it lacks config.json or weights.
    """
    given = f"{flag} {name}"
    check_name(name, given)
    huggingface_hub = import_client(given)
    repo, _, revision = name.partition("@")
    revision = revision or "main"

    def download(files: list[str]) -> str:
        with client_errors(name, given):
            return huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=files)

    try:
        with client_errors(name, given):
            model = huggingface_hub.HfApi().model_info(repo, revision=revision, timeout=TIMEOUT)
        weights = choose_weights(given, {file.rfilename for file in model.siblings or []})
        folder = download(SMALL_FILES)
        if check is not None:
            check(folder)
        folder = download([*SMALL_FILES, weights])  # all files again: there may be a new commit by now
        if not (Path(folder) / weights).is_file():  # older clients return what they have
            raise NoConnection(f"the download of {weights} broke off")
    except NoConnection as error:
        folder = cached_copy(repo, revision)
        if folder is None:
            raise UserError(
                f"{given} is no folder here, and it cannot be downloaded from {endpoint()}: {error}; "
                f"try again with a connection, or give a folder"
            ) from None
        warn(f"{given}: {error}; going on with commit {Path(folder).name[:12]} from the cache")
        if check is not None:
            check(folder)
    return folder


def check_name(name: str, given: str) -> None:
    """Raise UserError if no model at the hub can have the name."""
    if os.path.exists(name):
        raise UserError(f"{given} is not a folder; give the folder that holds config.json")
    if not POSSIBLE_NAME.fullmatch(name):
        raise not_a_name(given)


def not_a_name(given: str) -> UserError:
    return UserError(
        f"{given} is no folder here, and no model at the Hugging Face hub can have this name; give a "
        f"folder, or a name such as {EXAMPLE}"
    )


def not_found(given: str) -> UserError:
    """Return the error for an unknown name; the hub gives the same answer for a private model."""
    return UserError(
        f"{given} is no folder here, and {endpoint()} has no public model of this name; check the "
        f"spelling; a private model needs `hf auth login`"
    )


def import_client(given: str) -> ModuleType:
    """Return the module huggingface_hub, needed only for names at the hub; raise UserError if it is not installed."""
    try:
        import huggingface_hub

        return huggingface_hub
    except ImportError:
        raise UserError(
            f"{given} is no folder here, and a name at the Hugging Face hub needs a package that is "
            f"not here; pip install huggingface_hub, or give a folder"
        ) from None


def endpoint() -> str:
    """Return the address of the hub."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def choose_weights(given: str, files: set[str]) -> str:
    """Return the file of weights to read; raise UserError if a model with these files cannot be read."""
    if "config.json" not in files:
        raise UserError(
            f"{given}: the hub has no config.json for it, so it is not a model that can be read; give "
            f"an XLNet, such as {EXAMPLE}"
        )
    for weights in WEIGHTS:
        if weights in files:
            return weights
    if any(f"{weights}.index.json" in files for weights in WEIGHTS):
        raise UserError(
            f"{given}: its weights are in several files, and only one can be read; save them in one "
            f"with transformers, model.save_pretrained(folder, max_shard_size='1TB'), and give that folder"
        )
    raise UserError(
        f"{given}: the hub has neither {' nor '.join(WEIGHTS)} for it; give a model with one of them, such as {EXAMPLE}"
    )


def cached_copy(repo: str, revision: str) -> str | None:
    """Return the cached folder of a model if an earlier download was complete, else None."""
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=SMALL_FILES, local_files_only=True)
    except errors.LocalEntryNotFoundError:
        return None
    # The weights are downloaded last.
    has_weights = any((Path(folder) / weights).is_file() for weights in WEIGHTS)
    return folder if has_weights and (Path(folder) / "config.json").is_file() else None


@contextlib.contextmanager
def client_errors(name: str, given: str) -> Iterator[None]:
    """Turn the client's errors in the with block into NoConnection, or into UserError if the hub or the disk refuses.

    Clients before 1.0 raise the errors of requests, later ones those of httpx; errors.HTTPError is the base of both.
    """
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.HFValidationError:
        raise not_a_name(given) from None
    except errors.GatedRepoError:
        raise UserError(
            f"{given} is gated; request access at {constants.ENDPOINT}/{name.partition('@')[0]}, then `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise not_found(given) from None
    except errors.RevisionNotFoundError:
        repo, _, revision = name.partition("@")
        raise UserError(
            f"{given}: {constants.ENDPOINT}/{repo} has no revision {revision or 'main'}; give one of "
            f"its branches, tags or commits after the @"
        ) from None
    except errors.OfflineModeIsEnabled:
        raise NoConnection("HF_HUB_OFFLINE is set") from None
    except RuntimeError as error:  # hf_xet, if installed, downloads large files and raises this for every failure
        raise NoConnection(f"{first_line(error)} (HF_HUB_DISABLE_XET=1 does without hf_xet)") from None
    except json.JSONDecodeError:
        raise NoConnection("the answer is not that of a hub") from None
    except (OSError, errors.HTTPError) as error:
        response = getattr(error, "response", None)
        status = None if response is None else response.status_code
        if status == 403 or (status == 401 and "credentials" in response.headers.get("X-Error-Message", "")):
            raise UserError(
                f"{given}: {constants.ENDPOINT} refuses your token: {first_line(error)}; "
                f"`hf auth login` with an account that may read the model, or `hf auth logout`"
            ) from None
        if status == 401:  # the client does not interpret the 401 of a hub without TLS
            raise not_found(given) from None
        if isinstance(error, OSError) and error.errno is not None:  # network errors have none
            raise UserError(
                f"{given}: cannot write it to {constants.HF_HUB_CACHE}: {error.strerror}; make room "
                f"there, or set HF_HOME to another folder"
            ) from None
        raise NoConnection(first_line(error.__cause__ or error)) from None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text that is not blank, or the name of its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
