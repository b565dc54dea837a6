"""Register the quantizer with transformers when its quantizers are imported, and import nothing before."""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_QUANTIZERS = "transformers.quantizers.auto"


def register_when_needed() -> None:
    """Make compressed folders loadable: at once where transformers' quantizers are imported already, else with them.

    They take twice as long to import as torch; a program that loads no model, such as `distill --help`, spares them.
    """
    if _QUANTIZERS in sys.modules:
        _register()
    elif not any(isinstance(finder, _QuantizersFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _QuantizersFinder())


def _register() -> None:
    from distill.compression import loading  # noqa: F401  (registers where it defines)


class _QuantizersFinder(MetaPathFinder):
    """Finds transformers' quantizers as they would be found without it, to be loaded by `_RegisteringLoader`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _QUANTIZERS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    """Loads the quantizers as their own loader does, and registers ours afterwards.

    Args:
        loader: their own, which they also name as theirs once they are loaded.
    """

    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _register()
