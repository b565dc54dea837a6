"""Rows: read from files or the Hub, checked, labelled, tokenized and batched."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.data.load import DataOptions, load_data

__all__ = ["DataOptions", "load_data"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from distill.data import load

    return getattr(load, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
