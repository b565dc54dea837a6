"""Push a run folder to the Hub: one commit with model, tokenizer, card, plots, recipe and report."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import disable_progress_bars

from distill.common.console import log
from distill.common.credentials import known_secrets, refuse_secrets, require_token
from distill.common.local_names import LocalNames
from distill.common.records import Report, StepRecord, read_record, read_report, read_step
from distill.common.serialized import json_text
from distill.common.sources import (
    causes,
    reason_of,
    repo_id_problem,
    split_revision,
)
from distill.errors import InputError
from distill.models.adapters import ADAPTER_CONFIG
from distill.publishing.published import published
from distill.recipes.yaml12 import read_yaml
from distill.runs.card import TAG, model_card

PUSHED = "pushed.json"
"""In a run folder: where its model was pushed to."""

_READ_OF_A_RECORD = (
    *("name", "run", "kind", "text", "labels", "parents", "ancestors", "sources", "root", "options", "environment"),
    *("data", "data_revision", "rows", "scored", "layers", "layer_pairs", "train_seconds", "started", "wall_seconds"),
)
_WEIGHTS = re.compile(r"[^/]*\.safetensors(\.index\.json)?|adapter_config\.json|export\.json|(onnx|openvino)/.*")
_ENDINGS_OF_WEIGHTS = (".safetensors", ".onnx", ".bin")
_FILES_OF_ANY_REPOSITORY = re.compile(r"\.git.*|README\.md|LICENSE.*")
_CACHED_MODEL = re.compile(r".*/models--(?P<id>[^/]+)/snapshots/(?P<revision>[0-9a-f]{40})/?")


@dataclass(frozen=True)
class Pushed:
    """A model on the Hub; as it stands in pushed.json."""

    repo_id: str
    commit: str
    url: str
    revision: str | None = None
    """The branch, if not the main one."""


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    collection: str | None = None,
) -> tuple[Pushed, bool]:
    """Push a finished run folder; what is there already is not sent again, and nothing is committed twice.

    Args:
        folder: of a finished step, in a run with a report.
        repo_id: `ORG/NAME`; made if it does not exist.
        private: make the repository private.
        revision: a branch; made if it does not exist.
        collection: the collection (its slug, as in its address) that the model is added to.

    Returns:
        Where it is, and whether anything was new.

    Raises:
        InputError: the name, the folder, the token, the repository or the network doesn't allow it.
    """
    content = to_push(folder, repo_id)
    require_token()
    if not log.is_terminal:
        disable_progress_bars()
    api = HfApi()
    with _one_message_each(repo_id):
        if collection is not None:
            _check_collection(api, collection)
        found = _repository(api, repo_id, private=private, revision=revision)
        _check_content(found, repo_id)
        there = {sibling.rfilename for sibling in found.siblings or ()}
        stale = [name for name in there - content.keys() if _WEIGHTS.fullmatch(name)]
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, source) for name, source in content.items()),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=f"Push {(read_step(folder) or StepRecord()).name}",
            revision=revision,
            parent_commit=found.sha,
        )
        pushed = Pushed(repo_id, commit.oid, f"{constants.ENDPOINT}/{repo_id}", revision)
        (folder / PUSHED).write_text(json_text(asdict(pushed)) + "\n", encoding="utf-8")
        if collection is not None:
            api.add_collection_item(collection, repo_id, "model", exists_ok=True)
    return pushed, commit.oid != found.sha


def to_push(folder: Path, repo_id: str) -> dict[str, Path | bytes]:
    """Collect what is pushed, and the same by a dry run: for each path in the repository a file, or its content.

    Args:
        folder: of a finished step; the run's `recipe.yaml` and `report.json` lie in the folder above it.
        repo_id: `owner/name` on the Hub.

    Raises:
        InputError: a wrong name, an unfinished folder, a report that is missing or old, adapters of a local model, or
            what looks like a token in what would be pushed.
    """
    problem = repo_id_problem(repo_id)
    if problem:
        raise InputError(f"--repo-id: {problem}")
    record, report = _finished(folder)
    names = LocalNames(folder, _read_recipe(folder.resolve().parent / "recipe.yaml"), report)
    adapted, config = _adapted(folder) if (folder / ADAPTER_CONFIG).is_file() else (None, {})
    content = published(folder, names, report)
    config_name = "config.json" if adapted is None else ADAPTER_CONFIG
    if config_name not in content or not any(name.endswith(_ENDINGS_OF_WEIGHTS) for name in content):
        raise InputError(f"{folder}: lacks its {config_name} or its weights; `distill run` the step again")
    if adapted is not None:
        content[ADAPTER_CONFIG] = (json_text(names.rewritten(config), indent=2) + "\n").encode()
    card = names.in_markdown(model_card(folder.resolve(), record, report, name=repo_id, adapted=adapted))
    refuse_secrets("README.md", card, known_secrets())
    return content | {"README.md": card.encode()}


def write_content(content: dict[str, Path | bytes], folder: Path) -> None:
    """Write what would be pushed into a folder.

    Args:
        content: for each file name a file to copy, or the content itself (see `to_push`).
        folder: new, or empty.

    Raises:
        InputError: there is something already, or it can't be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--dry-run: {folder} is not empty; name a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, source in content.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(source if isinstance(source, bytes) else source.read_bytes())
    except OSError as error:
        raise InputError(f"--dry-run: {folder} cannot be written ({error.strerror})") from None


# --- what is in the folder ------------------------------------------------------------------------------------------


def _finished(folder: Path) -> tuple[StepRecord, Report]:
    """step.json and report.json of a folder that can be pushed."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run folder; it is output_dir/<step> of a run")
    record = read_step(folder)
    if record is None:
        steps = [path.parent.name for path in sorted(folder.glob("*/step.json"))]
        hint = f"; name a step of it: {', '.join(str(folder / name) for name in steps)}" if steps else ""
        raise InputError(f"{folder}: no run folder (no step.json){hint}")
    if record.status != "finished":
        raise InputError(f"{folder}: the step is not finished; `distill run` finishes it")
    file = folder.resolve().parent / "report.json"
    remedy = "`distill report` writes it, and the card shows its numbers"
    if not file.is_file():
        raise InputError(f"{folder}: its run has no report.json; {remedy}")
    report = read_report(file.parent)
    if report is None:
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{file}: cannot be read ({reason_of(error)}); {remedy}") from None
        raise InputError(f"{file}: no report of this version of distill; {remedy}")
    missing = [key for key in _READ_OF_A_RECORD if key not in read_record(folder)]
    if missing:
        raise InputError(
            f"{folder}: its step.json lacks {', '.join(missing)}, as another version of distill wrote it; "
            "`distill run` the step again"
        )
    ended = datetime.fromisoformat(record.started) + timedelta(seconds=record.wall_seconds or 0)
    if file.stat().st_mtime < ended.timestamp():
        raise InputError(f"{folder}: report.json is older than the model; {remedy}")
    if report.entry(record.name) is None:
        raise InputError(
            f"{folder}: report.json leaves it out, as it is not what the recipe would make now; `distill run` it again"
        )
    return record, report


def _read_recipe(file: Path) -> dict[str, Any]:
    recipe = read_yaml(file)
    steps = recipe.get("steps")
    if not isinstance(steps, dict) or not all(isinstance(step, dict) for step in steps.values()):
        raise InputError(f"{file}: is not the recipe that `distill run` wrote there; run it again")
    if not isinstance(recipe.get("output_dir"), str):
        raise InputError(f"{file}: names no output_dir, as the recipe that `distill run` writes does; run it again")
    return recipe


def _adapted(folder: Path) -> tuple[str, dict[str, Any]]:
    """The repository of the model that a folder's adapters adapt, and their config, which names it.

    Raises:
        InputError: that model is a folder here that was not pushed.
    """
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    base = config["base_model_name_or_path"]
    cached = _CACHED_MODEL.fullmatch(base)
    # A relative path started where the run did; a step of the same run lies beside this one.
    here = next((each for each in (Path(base), folder.resolve().parent / Path(base).name) if each.is_dir()), None)
    if cached:
        repo_id, revision = cached["id"].replace("--", "/"), cached["revision"]
    elif here is not None:
        if not (here / PUSHED).is_file():
            raise InputError(
                f"{folder}: adapters of {here}, a folder here, which nobody else has; push that one first "
                f"(distill push {here} --repo-id ORG/NAME)"
            )
        pushed = json.loads((here / PUSHED).read_text(encoding="utf-8"))
        repo_id, revision = pushed["repo_id"], pushed["revision"] and pushed["commit"]
    else:
        repo_id, revision = split_revision(base)
    if repo_id_problem(repo_id):
        raise InputError(f"{folder}: adapters of {base}, which is no model on the Hub and no folder here")
    return repo_id, config | {"base_model_name_or_path": repo_id, "revision": revision or config.get("revision")}


# --- what is on the Hub ---------------------------------------------------------------------------------------------


def _repository(api: HfApi, repo_id: str, *, private: bool, revision: str | None) -> ModelInfo:
    """The repository at the branch to push to; both are made where they don't exist."""
    try:
        found = api.model_info(repo_id)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=private or None)
        found = api.model_info(repo_id)
    if private and not found.private:
        raise InputError(
            f"{repo_id}: exists and is public, and --private makes new repositories only; nothing was pushed"
        )
    if revision is None:
        return found
    try:
        return api.model_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        api.create_branch(repo_id, branch=revision)
        return api.model_info(repo_id, revision=revision)


def _check_content(found: ModelInfo, repo_id: str) -> None:
    """Raise where the repository holds files of someone or something else, which a push would mix with ours."""
    tags = found.card_data.get("tags") if found.card_data else None
    foreign = [
        sibling.rfilename
        for sibling in found.siblings or ()
        if not _FILES_OF_ANY_REPOSITORY.fullmatch(sibling.rfilename)
    ]
    if foreign and TAG not in (tags or []):
        shown = ", ".join(sorted(foreign)[:3])
        raise InputError(
            f"{repo_id}: exists and holds files that distill did not push ({shown}); nothing was changed, "
            "name another repository"
        )


def _check_collection(api: HfApi, slug: str) -> None:
    try:
        api.get_collection(slug)
    except HfHubHTTPError as error:
        if error.response.status_code == 404:
            raise InputError(
                f"--collection: no collection {slug!r}; give the last two parts of its address, ORG/title-id"
            ) from None
        raise


@contextmanager
def _one_message_each(repo_id: str) -> Iterator[None]:
    """Failing requests as one message each, without the token that they carried."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the Hub client, its threads, httpx and xet raise their own kinds
        chain = list(causes(error))
        answered = next((each for each in chain if isinstance(each, HfHubHTTPError)), None)
        if answered is not None:
            problem = _answer(answered, repo_id)
        elif any(isinstance(each, OfflineModeIsEnabled) for each in chain):
            problem = "HF_HUB_OFFLINE is set, so nothing can be pushed; unset it"
        elif any(isinstance(each, OSError | RuntimeError) or "httpx" in type(each).__module__ for each in chain):
            problem = (
                f"{constants.ENDPOINT} cannot be reached, or broke off ({reason_of(chain[-1])}); "
                "the run folder is whole, and the same command goes on"
            )
        else:
            raise
        raise InputError(f"{repo_id}: {problem}") from None


def _answer(error: HfHubHTTPError, repo_id: str) -> str:
    """What the Hub's answer to a failed request means."""
    status = error.response.status_code
    if status == 401:
        return "the Hub does not know this token; log in again with `hf auth login`, or set another HF_TOKEN"
    if status == 403:
        owner = repo_id.partition("/")[0]
        return f"the token has no right to write there; use one with write access to {owner}, or another name"
    if status == 404:
        return "no such repository, or this token may not see it"
    if status == 409:
        return "exists already, but this token may not see it; name another repository"
    if status == 412:
        return "someone else changed it during the push; nothing was changed, the same command looks again"
    server = (error.server_message or reason_of(error)).strip().split("\n")[0]
    return f"the Hub answered {status} ({server}); the run folder is whole, and the same command goes on"
