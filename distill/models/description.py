"""The description in a folder's config.json of modules that its config alone can't describe."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers.configuration_utils import PretrainedConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from distill.errors import InputError

# transformers prints this name when it doesn't know it, that is without `import distill`.
METHOD = "distill (first: import distill)"

VERSION = 2
"""Of what is written. Version 1 knew quantized modules alone, and did not say its number."""

_FIELDS_OF_VERSION_1 = {
    "int8": ("threshold",),
    "nf4": ("double_quant", "block_size", "compute_dtype"),
    "fp4": ("double_quant", "block_size", "compute_dtype"),
}


@dataclass(frozen=True)
class Entry:
    """Modules that are built alike, in place of those of their names."""

    kind: str
    """What they are, such as `resized` or `nf4`."""
    fields: dict[str, Any]
    """How they are built: the arguments of that kind's dataclass."""
    names: tuple[str, ...]
    """Full names of the modules, as in the class that the model was saved as."""


class Description(QuantizationConfigMixin):
    """What is saved under `quantization_config`, which is where transformers lets another package build modules.

    No key may start with `load_in_`: AutoQuantizationConfig hands every such config to bitsandbytes' own quantizer,
    which knows nothing of the others.

    Args:
        replacements: entries as plain mappings: `kind`, the fields of that kind, and `names`. They are applied in
            their order, so a later one sees the modules that an earlier one has put there.

    Raises:
        InputError: a version that is newer than this package.
    """

    def __init__(
        self, replacements: Sequence[Mapping[str, Any]], version: int = VERSION, quant_method: str = METHOD
    ) -> None:
        self.quant_method = quant_method
        self.version = version
        self.replacements = [dict(entry) for entry in replacements]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read the description in a config.json, of whichever version; transformers calls this.

        Args:
            config_dict: what stands under `quantization_config`.
            return_unused_kwargs: whether to return `kwargs` too.

        Raises:
            InputError: a version that is newer than this package.
        """
        description = describe(_read(config_dict))
        return (description, kwargs) if return_unused_kwargs else description


def describe(entries: Sequence[Entry]) -> Description:
    """Make the description of entries that is saved in config.json."""
    return Description([{"kind": entry.kind, **entry.fields, "names": list(entry.names)} for entry in entries])


def entries_of(config: PretrainedConfig) -> list[Entry]:
    """Read the replaced modules that a config describes, in the order in which they are put in; none of a plain one's.

    Raises:
        InputError: a version that is newer than this package.
    """
    description = getattr(config, "quantization_config", None)
    return entries_in(description.to_dict() if isinstance(description, QuantizationConfigMixin) else description)


def entries_in(description: Mapping[str, Any] | None) -> list[Entry]:
    """Read the replaced modules from what stands under `quantization_config` in a config.json.

    Raises:
        InputError: a version that is newer than this package.
    """
    if description is None or description.get("quant_method") != METHOD:
        return []
    return _read(description)


def grouped(replacements: Mapping[str, Any]) -> list[Entry]:
    """Group replacements by name into entries, one for those that are alike.

    Args:
        replacements: dataclasses, whose class says its `kind`.
    """
    names: dict[Any, list[str]] = {}
    for name, replacement in replacements.items():
        names.setdefault(replacement, []).append(name)
    return [Entry(replacement.kind, asdict(replacement), tuple(found)) for replacement, found in names.items()]


def _read(description: Mapping[str, Any]) -> list[Entry]:
    version = description.get("version", 1)
    if version == 1:
        return _read_version_1(description)
    if version != VERSION:
        raise InputError(
            f"quantization_config: its version is {version}, and this package reads up to {VERSION}; "
            "install a newer one (pip install --upgrade distill-transformers)"
        )
    entries = []
    for stored in copy.deepcopy(description["replacements"]):
        kind, names = stored.pop("kind"), tuple(stored.pop("names"))
        entries.append(Entry(kind, stored, names))
    return entries


def _read_version_1(description: Mapping[str, Any]) -> list[Entry]:
    """A format for each name, and settings that hold for all of them."""
    names: dict[str, list[str]] = {}
    for name, kind in description["formats"].items():
        names.setdefault(kind, []).append(name)
    entries = []
    for kind, found in names.items():
        fields = {field: description[field] for field in _FIELDS_OF_VERSION_1[kind] if field in description}
        entries.append(Entry(kind, fields, tuple(found)))
    if description.get("tied_head") is not None:
        entries.append(Entry("tied", {}, (description["tied_head"],)))
    return entries
