"""A tokenizer's `tokenizer.json`: which tokens no text can do without, and the file with fewer tokens.

Written on the file itself: skeletoken 0.6.1 reads and writes it too, but moves added tokens that stand beside the
vocabulary (DeBERTa-v3's mask) into it, and what must stay is the longer half of the work.
"""

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from distill.errors import InputError

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_IN_PIECES = ("WordPiece", "BPE", "Unigram")

Description = dict[str, Any]
"""The content of a `tokenizer.json`."""


def read_description(tokenizer: PreTrainedTokenizerBase) -> Description:
    """What a tokenizer's `tokenizer.json` holds.

    Raises:
        InputError: it has no such file, or its words don't fall into smaller tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(
            f"tokenizer: {type(tokenizer).__name__} is not one of the tokenizers library, whose file (tokenizer.json) "
            "can be rewritten; load the model's fast tokenizer"
        )
    description = json.loads(backend.to_str())
    kind = description["model"]["type"]
    if kind not in _IN_PIECES:
        raise InputError(
            f"tokenizer: a {kind} vocabulary cannot be trimmed, since a word that is left out would become unknown; "
            f"these can: {', '.join(_IN_PIECES)}"
        )
    return description


def ids_of(description: Description) -> dict[str, int]:
    """The id of every token, added ones too."""
    vocabulary = description["model"]["vocab"]
    if description["model"]["type"] == "Unigram":
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in description["added_tokens"]}}


def parents_of(description: Description) -> dict[int, set[int]]:
    """For each token that BPE merges make, the ids of the two sides of each of these merges; none for other models.

    As long as a token's parents and theirs are there, merging goes the way it went before: the merges inside of a token
    happen in the same order whatever stands around it, and merges that are left out were none of them.
    """
    ids = ids_of(description)
    parents: dict[int, set[int]] = defaultdict(set)
    for left, right in description["model"].get("merges", ()):
        parents[ids[_merged(description, left, right)]] |= {ids[left], ids[right]}
    return parents


def necessary_ids(tokenizer: PreTrainedTokenizerBase, description: Description) -> set[int]:
    """The ids of tokens that stay whatever is counted, so that no text becomes unknown that was not.

    These are special and added tokens, the unknown token, single characters (in WordPiece those within a word, `##a`,
    too), bytes, and tokens that hold a character which is no token by itself. Of a Unigram vocabulary the token with
    the lowest score as well: unknown characters are scored by it, so that segmentation would change without.

    Args:
        tokenizer: says which tokens are special.
        description: its own, by `read_description`.
    """
    ids, model = ids_of(description), description["model"]
    necessary = {token["id"] for token in description["added_tokens"]} | set(tokenizer.all_special_ids)
    necessary |= {ids[token] for token in _tokens_around_texts(description["post_processor"])}
    necessary |= {ids[token] for token in (model.get("unk_token"),) if token in ids}
    if description["padding"] is not None:
        necessary.add(description["padding"]["pad_id"])
    for token, number in ids.items():
        characters = _in_characters(token, model)
        if len(characters) == 1 or _BYTE.fullmatch(token) or not ids.keys() >= set(characters):
            necessary.add(number)
    if model["type"] == "Unigram":
        scores = [score for _, score in model["vocab"]]
        necessary |= {scores.index(min(scores))} | ({model["unk_id"]} - {None})
    return necessary


def with_tokens(description: Description, kept: Sequence[int]) -> Description:
    """The file with these tokens alone, numbered anew in their order; everything else of it stays.

    Args:
        kept: ids in ascending order, with the necessary ones, and with a token's parents.
    """
    new = {old: number for number, old in enumerate(kept)}
    ids = {token: new[old] for token, old in ids_of(description).items() if old in new}
    model = dict(description["model"])
    if model["type"] == "Unigram":
        model["vocab"] = [entry for number, entry in enumerate(model["vocab"]) if number in new]
        model["unk_id"] = None if model["unk_id"] is None else new[model["unk_id"]]
    else:
        model["vocab"] = {token: new[old] for token, old in model["vocab"].items() if old in new}
    if "merges" in model:
        model["merges"] = [[left, right] for left, right in model["merges"] if _merged(description, left, right) in ids]
    padding = description["padding"]
    return {
        **description,
        "model": model,
        "added_tokens": [{**token, "id": new[token["id"]]} for token in description["added_tokens"]],
        "post_processor": _renumbered(description["post_processor"], ids),
        "padding": None if padding is None else {**padding, "pad_id": new[padding["pad_id"]]},
    }


def with_description(tokenizer: PreTrainedTokenizerBase, description: Description) -> PreTrainedTokenizerBase:
    """A tokenizer of the same class and settings that reads as this file says; the given one stays as it is.

    Args:
        tokenizer: whose class and settings are kept.
        description: the content of the new tokenizer's `tokenizer.json`, by `with_tokens`.

    Raises:
        InputError: its class makes something else of the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "tokenizer_config.json"
        tokenizer.save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_text(json.dumps(description, ensure_ascii=False), encoding="utf-8")
        options = json.loads(settings.read_text(encoding="utf-8"))
        if "unk_id" in options:  # DeBERTa-v2's
            options["unk_id"] = description["model"]["unk_id"]
            settings.write_text(json.dumps(options, ensure_ascii=False), encoding="utf-8")
        made = type(tokenizer).from_pretrained(folder)
    made.name_or_path = ""  # no folder holds it yet
    if json.loads(made.backend_tokenizer.to_str()) != description:
        raise InputError(
            f"tokenizer: {type(tokenizer).__name__} does not read its own tokenizer.json as it is written, so its "
            "vocabulary cannot be trimmed; load it with PreTrainedTokenizerFast"
        )
    return made


def _merged(description: Description, left: str, right: str) -> str:
    """The token that a merge of BPE makes."""
    return left + right.removeprefix(description["model"].get("continuing_subword_prefix") or "")


def _in_characters(token: str, model: Mapping[str, Any]) -> list[str]:
    """What a token falls into, a character each, in the form that a character has at its place in a word."""
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    inside = prefix if len(token) > len(prefix) and token.startswith(prefix) else ""
    ending = suffix if len(token) > len(suffix) and token.endswith(suffix) else ""
    characters = token[len(inside) : len(token) - len(ending)]
    if not characters:
        return [token]
    forms = [prefix + character for character in characters]
    forms[0] = inside + characters[0]
    forms[-1] += ending
    return forms


def _parts(post_processor: Mapping[str, Any] | None) -> Iterable[Mapping[str, Any]]:
    if post_processor is None:
        return []
    return post_processor["processors"] if post_processor["type"] == "Sequence" else [post_processor]


def _tokens_around_texts(post_processor: Mapping[str, Any] | None) -> set[str]:
    """The tokens that are put around texts."""
    tokens: set[str] = set()
    for part in _parts(post_processor):
        tokens |= {token for each in part.get("special_tokens", {}).values() for token in each["tokens"]}
        tokens |= {part[name][0] for name in ("cls", "sep") if name in part}
    return tokens


def _renumbered(post_processor: Mapping[str, Any] | None, ids: Mapping[str, int]) -> dict[str, Any] | None:
    """A post-processor whose tokens have these ids."""
    if post_processor is None:
        return None
    if post_processor["type"] == "Sequence":
        return {**post_processor, "processors": [_renumbered(part, ids) for part in post_processor["processors"]]}
    changed = dict(post_processor)
    if "special_tokens" in changed:  # TemplateProcessing
        changed["special_tokens"] = {
            name: {**each, "ids": [ids[token] for token in each["tokens"]]}
            for name, each in changed["special_tokens"].items()
        }
    for name in ("cls", "sep"):  # BertProcessing and RobertaProcessing
        if name in changed:
            token, _ = changed[name]
            changed[name] = [token, ids[token]]
    return changed
