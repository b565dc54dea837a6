"""Values of options, checked against their annotations."""

from typing import Any, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import is_typeddict  # typing's own from Python 3.12 on

from distill.errors import InputError, nearest_name


def checked(value: Any, annotation: Any) -> Any:
    """Validate a value against its annotation, and return it converted to that.

    Args:
        value: as a user gave it.
        annotation: of the option's field.

    Raises:
        InputError: it is something else.
    """
    adapter: TypeAdapter = TypeAdapter(annotation, config=ConfigDict(coerce_numbers_to_str=True))
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        parts = error.errors()
        if isinstance(value, dict):  # of a union's members only the mapping was meant
            parts = [
                part for part in parts if part["type"] not in ("float_type", "literal_error", "list_type")
            ] or parts
        else:
            parts = [part for part in parts if part["type"] != "dict_type"] or parts
        keys = _keys(annotation)
        messages = []
        for part in parts:
            place = "".join(f"[{item}] " for item in part["loc"] if isinstance(item, int))
            last = part["loc"][-1] if part["loc"] else None
            message = part["msg"].removeprefix("Input ").replace("Field required", "is missing")
            if part["type"] == "extra_forbidden":
                message = f"is no such key ({nearest_name(str(last), keys)})"
            if part["type"] == "extra_forbidden" or last in keys:
                place += f"{last} "
            messages.append(place + message)
        found = (", " if isinstance(value, dict) else " or ").join(dict.fromkeys(messages))
        raise InputError(f"{found}; got {value!r}") from None


def _keys(annotation: Any) -> list[str]:
    """Of the mappings that a value may be."""
    if is_typeddict(annotation):
        return list(annotation.__annotations__)
    return [key for member in get_args(annotation) for key in _keys(member)]
