"""Tokens, keys and passwords, which no file that is published may hold."""

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import (
    get_token,
)

from distill.common.local_names import WORDS
from distill.errors import InputError

_SECRETS = {
    "a token of the Hub": re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{20,}"),
    "a token of GitHub": re.compile(r"\b(gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{22})"),
    "a key of AWS": re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a key of Google": re.compile(r"\bAIza[0-9A-Za-z_-]{35}"),
    "a token of Slack": re.compile(r"\bxox[abprs]-[0-9A-Za-z-]{10,}"),
    "a key of a model's API": re.compile(r"\bsk-(ant-|proj-)?[A-Za-z0-9_-]{32,}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a password in an address": re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s/:@\"'<>]+:[^\s/@\"'<>]+@"),
}
_SECRET_KEY = re.compile(r".*(password|passwd|secret|api_?key|access_?key|private_?key|auth_?token|hub_token)", re.I)


def known_secrets() -> dict[str, re.Pattern]:
    """What no file that goes up may hold, this machine's token as it is now among them."""
    token = get_token()
    return _SECRETS | ({"this machine's token of the Hub": re.compile(re.escape(token))} if token else {})


def refuse_secrets(file: str, text: str, secrets: Mapping[str, re.Pattern]) -> None:
    """Raise where a text holds what looks like a token.

    Args:
        file: its name, for the message.
        secrets: of `known_secrets`.

    Raises:
        InputError: with the line, and not with the token.
    """
    for number, line in enumerate(text.splitlines(), start=1):
        _refuse_secret(file, f"line {number}", line, secrets)


def refuse_secrets_under(
    file: str, content: Any, secrets: Mapping[str, re.Pattern], path: tuple[str, ...] = ()
) -> None:
    """Raise where the content of a JSON or YAML file holds what looks like a token, or a value under a key for secrets.

    Args:
        file: its name, for the message.
        content: what was read from the file; of a mapping the keys are searched too.
        secrets: of `known_secrets`.
        path: keys that the content stands under, outermost first.

    Raises:
        InputError: with the keys, and not with the token.
    """
    if isinstance(content, dict):
        for key, value in content.items():
            place = (*path, str(key))
            named = isinstance(value, str) and value and _SECRET_KEY.fullmatch(str(key))
            if named and not any(WORDS.fullmatch(each) for each in path):
                raise InputError(_secret_problem(file, ".".join(place), "a secret"))
            _refuse_secret(file, ".".join(path) or "a key", str(key), secrets)
            refuse_secrets_under(file, value, secrets, place)
    elif isinstance(content, list):
        for value in content:
            refuse_secrets_under(file, value, secrets, path)
    elif isinstance(content, str):
        _refuse_secret(file, ".".join(path), content, secrets)


def _refuse_secret(file: str, place: str, text: str, secrets: Mapping[str, re.Pattern]) -> None:
    for kind, pattern in secrets.items():
        if pattern.search(text):
            raise InputError(_secret_problem(file, place, kind))


def _secret_problem(file: str, place: str, kind: str) -> str:
    return f"{file}: {place} holds what looks like {kind}; take it out (nothing was pushed), and revoke it if it is one"


class UnsavedToken(str):
    """A token that any library may send, and that a pickle holds as an empty text.

    Trainer writes its arguments, `hub_token` among them, as `training_args.bin`, and uploads that file.
    """

    def __reduce_ex__(self, protocol: Any) -> tuple[type, tuple[str]]:
        return str, ("",)

    def __copy__(self) -> "UnsavedToken":
        return self

    def __deepcopy__(self, memo: dict) -> "UnsavedToken":
        return self


def require_token() -> None:
    """Say at once that a push needs a token.

    Raises:
        InputError: there is none, or one that can't be sent.
    """
    token = get_token()
    if token is None:
        raise InputError("no token for the Hub: log in with `hf auth login`, or set HF_TOKEN to one that may write")
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise InputError("HF_TOKEN: holds a character that no token has; copy it again (it was not sent)")
