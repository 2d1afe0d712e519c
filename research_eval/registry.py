"""Name -> class. A new file in `models/` or `datasets/` registers itself; no list has to be edited."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, MutableMapping
from typing import TypeVar

from research_eval.errors import ConfigError
from research_eval.wording import hint

C = TypeVar("C", bound=type)


class Registry(MutableMapping[str, type]):
    """A mutable mapping that imports the modules of `package` when it is first read.

    Writing (`registry["name"] = cls`, `@registry.register("name")`) imports nothing, so the command
    line can be built without torch.
    """

    def __init__(self, field: str, package: str) -> None:
        self.field = field
        self._package = package
        self._discovered = False
        self._classes: dict[str, type] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator: file the class under `name`."""

        def enter(cls: C) -> C:
            known = self._classes.get(name)
            if known is not None and known.__qualname__ != cls.__qualname__:
                raise ValueError(f"{self.field}: {name!r} is already {known.__module__}.{known.__qualname__}")
            self._classes[name] = cls
            return cls

        return enter

    def _discover(self) -> dict[str, type]:
        if not self._discovered:
            self._discovered = True
            package = importlib.import_module(self._package)
            for module in sorted(info.name for info in pkgutil.iter_modules(package.__path__)):
                importlib.import_module(f"{self._package}.{module}")
        return self._classes

    def __getitem__(self, name: str) -> type:
        classes = self._discover()
        if name not in classes:
            raise KeyError(name)
        return classes[name]

    def get_or_explain(self, name: str) -> type:
        """The class, or a ConfigError that lists the known names."""
        classes = self._discover()
        if name not in classes:
            raise ConfigError(f"{self.field}: unknown {name!r}.{hint(name, classes)}")
        return classes[name]

    def __setitem__(self, name: str, cls: type) -> None:
        self._classes[name] = cls

    def __delitem__(self, name: str) -> None:
        del self._discover()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._discover())

    def __len__(self) -> int:
        return len(self._discover())


MODELS_MAP = Registry("model_type", "research_eval.models")
SYNTHETIC_DATASETS = Registry("dataset_name", "research_eval.datasets")
