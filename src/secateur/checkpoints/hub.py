"""Models of the hub: what a repository holds is looked at first, and refused or fetched after that.

Small files come first, and what they say is checked before any weight is asked for; then the shards
that the index names, and nothing else. What is fetched lies in the hub's own cache.
"""

from __future__ import annotations

import errno
import glob
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, ResolvedRevision, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
    XetDownloadError,
)
from huggingface_hub.hf_api import RepoFile

from secateur.checkpoints.copied import TEMPLATES
from secateur.checkpoints.folder import INDEX, SINGLE, is_whole, wanted_shards
from secateur.checkpoints.no_weights import no_config, no_weights
from secateur.errors import BadCheckpoint, DiskFull, SecateurError, in_one_line
from secateur.system.sizes import in_words

TEXTS = (".json", ".model", ".txt", ".jinja", ".tiktoken")
LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
HUB_ERRORS = (
    HTTPError,
    OSError,
    RevisionResolutionError,
    XetDownloadError,
    ValueError,
    RuntimeError,
)
"""What the hub's client raises, whatever goes wrong."""


class Wanted(NamedTuple):
    """What is fetched of a model: its `code` where that is trusted, its `weights` where they are
    needed; `check` looks at the folder before them, and raises where they would be of no use.
    """

    check: Callable[[Path], object]
    code: bool = False
    weights: bool = True


class Repository(NamedTuple):
    """A model of the hub at one commit: its name, that commit, and the bytes of each file."""

    name: str
    revision: ResolvedRevision
    files: Mapping[str, int]


def fetch(name: str, revision: str | None, wanted: Wanted) -> Path:
    """The folder of a model of the hub at a branch, tag or commit, by default the main branch.

    Where the hub cannot be reached, what was fetched before. Raises BadCheckpoint for whatever the
    hub does not give out, or cannot be used here; DiskFull.
    """
    try:
        repository = _look_up(name, revision)
    except HUB_ERRORS as error:
        if _is_out_of_reach(error):
            return _from_cache(name, revision, wanted, error)
        raise refusal(name, revision, error) from error
    names = [file for file in repository.files if "/" not in file]
    if "config.json" not in names:
        raise no_config(name, names, hub=True)
    if SINGLE not in names and INDEX not in names and not _any_safetensors(names):
        raise no_weights(name, names, hub=True)
    folder = _download(repository, _small(repository.files, wanted))
    if (folder / "adapter_config.json").is_file() and wanted.weights:
        raise BadCheckpoint(
            f"{name} holds a model and an adapter (adapter_config.json), which would be loaded on "
            "top of it. Fetch it into a folder (hf download) and move the adapter elsewhere."
        )
    wanted.check(folder)
    if not wanted.weights:
        return folder
    shards = wanted_shards(folder, names)
    if absent := sorted(set(shards) - set(names)):
        raise (
            no_weights(name, names, hub=True)
            if shards == absent
            else BadCheckpoint(
                f"The index of {name} names {absent[0]}, which the repository does not have."
            )
        )
    _refuse_full_disk(repository, folder, shards)
    return _download(repository, shards)


def _any_safetensors(names: Iterable[str]) -> bool:
    """Whether config.json may name weights under another name than transformers' own."""
    return any(n.endswith(".safetensors") and not n.startswith("consolidated") for n in names)


def commit_of(folder: Path) -> dict[str, str] | None:
    """The name and the commit of the model whose folder in the hub's cache this is; None for any
    other folder.
    """
    kind, _, name = folder.parent.parent.name.partition("--")
    if folder.parent.name != "snapshots" or kind != "models" or not name:
        return None
    return {"repository": name.replace("--", "/"), "commit": folder.name}


def _look_up(name: str, revision: str | None) -> Repository:
    """What a repository holds, without fetching anything of it. Raises `HUB_ERRORS`."""
    api = HfApi()
    commit = api.resolve_revision(name, revision=revision)
    tree = api.list_repo_tree(name, revision=commit, recursive=True)
    return Repository(name, commit, {e.path: e.size for e in tree if isinstance(e, RepoFile)})


def _small(files: Iterable[str], wanted: Wanted) -> list[str]:
    """The files beside the weights that are fetched: configuration, tokenizer, chat templates, the
    index, licences; code only where it is trusted. Without weights what describes them alone.
    """
    if not wanted.weights:
        return [f for f in files if f in ("config.json", INDEX) or (wanted.code and _is_code(f))]
    chosen = []
    for file in files:
        other = file.endswith(".index.json") and file != INDEX
        top = "/" not in file and (file.endswith(TEXTS) or file.startswith(LICENCES))
        if (
            (top and not other)
            or file.startswith(f"{TEMPLATES}/")
            or (wanted.code and _is_code(file))
        ):
            chosen.append(file)
    return chosen


def _is_code(file: str) -> bool:
    return file.endswith(".py") and not file.startswith(".")


def _download(repository: Repository, files: Iterable[str]) -> Path:
    """Fetch some files of a repository; the folder that they lie in."""
    name, revision, _ = repository
    try:
        patterns = [glob.escape(file) for file in files]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except HUB_ERRORS as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"The disk filled up while {name} was fetched into {constants.HF_HUB_CACHE}. Free "
                "some of it, or set HF_HOME to another; what is whole is kept."
            ) from error
        raise refusal(name, str(revision), error, fetching=True) from error
    if absent := [file for file in files if not (folder / file).is_file()]:
        raise BadCheckpoint(
            f"The hub did not give {absent[0]} of {name}. Run the same command again; what is "
            "whole is kept."
        )
    return folder


def _refuse_full_disk(repository: Repository, folder: Path, shards: Iterable[str]) -> None:
    """Raise DiskFull where what is to be fetched does not fit."""
    missing = sum(repository.files[s] for s in shards if not (folder / s).exists())
    free = shutil.disk_usage(folder).free
    if missing > free:
        needed, left = (in_words(count, ("GiB", "MiB"), least=1 / 8) for count in (missing, free))
        raise DiskFull(
            f"{repository.name} has {needed} of weights to fetch, the disk of "
            f"{constants.HF_HUB_CACHE} {left} free. Free some of it, or set HF_HOME to another."
        )


def _from_cache(name: str, revision: str | None, wanted: Wanted, error: BaseException) -> Path:
    """What was fetched of a model before. Raises BadCheckpoint where that is not all."""
    reason = refusal(name, revision, error)
    try:
        folder = Path(
            snapshot_download(
                name, revision=revision, allow_patterns=["config.json"], local_files_only=True
            )
        )
    except HUB_ERRORS:
        raise reason from error
    if not (folder / "config.json").is_file() or (wanted.weights and not is_whole(folder)):
        raise BadCheckpoint(
            f"Only a part of {name} was fetched before, without its weights. {reason}"
        )
    wanted.check(folder)
    return folder


def _is_out_of_reach(error: BaseException) -> bool:
    """Whether the hub has not answered, as against having said no."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return not isinstance(error, (HFValidationError, ValueError))


def refusal(
    name: str, revision: str | None, error: BaseException, *, fetching: bool = False
) -> SecateurError:
    """What to raise for what the hub's client has raised."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    here = f"{name} is neither a folder here nor a model that the hub gives out"
    if isinstance(error, GatedRepoError) or status == 403:
        text = (
            f"The hub gives {name} only to those who have accepted its terms. Accept them at "
            f"{constants.ENDPOINT}/{name}, and log in: hf auth login, or HF_TOKEN."
        )
    elif isinstance(error, RevisionNotFoundError):
        text = (
            f"{name} has no revision {revision!r}; a branch, a tag or a commit was wanted. They "
            f"are listed at {constants.ENDPOINT}/{name}/tree/main."
        )
    elif isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        text = f"{here}. Check the name; if it is private, log in: hf auth login, or HF_TOKEN."
    elif status == 429:
        text = (
            f"The hub has had too many requests (429) to give {name} now. Wait some minutes, or "
            "log in, which allows more: hf auth login, or HF_TOKEN."
        )
    elif constants.HF_HUB_OFFLINE:
        text = f"{here}: HF_HUB_OFFLINE is set. Fetch it once without that: hf download {name}."
    elif fetching:
        text = (
            f"The connection to the hub was lost while {name} was fetched ({_cause(error)}). Run "
            "the same command again; what is whole is kept."
        )
    elif _is_out_of_reach(error):
        text = (
            f"{here}: the hub cannot be reached ({_cause(error)}). Try again with a connection, or "
            "name a folder."
        )
    else:
        text = f"{here}: {in_one_line(error)}."
    return BadCheckpoint(text)


def _cause(error: BaseException) -> str:
    """The first cause of an error, in a line; of an answer of the hub its status."""
    while not isinstance(error, HfHubHTTPError):
        if error.__cause__ is None:
            return in_one_line(error, 120)
        error = error.__cause__
    return f"it answers {error.response.status_code}"
