"""Name -> class. A new file registers its own class, so that no list has to be edited.

A registry finds files in the package that it belongs to, entries in `main.py` and in `datasets/providers.py`, and files
in the folders that GOE_EXTENSIONS names.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import pkgutil
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from research_eval.errors import ConfigError
from research_eval.wording import hint

if TYPE_CHECKING:
    from pydantic_core import CoreSchema

# The two modules into which users write entries. A registry imports them when it is read, so that every process knows
# the entries: other scripts and workers too. If `main.py` runs as a script, it is executed twice, with equal entries.
EDITED = ("research_eval.datasets.providers", "research_eval.main")
EXTENSIONS_VARIABLE = "GOE_EXTENSIONS"
EXTENSION_PREFIX = "goe_extension_"  # of the names of modules that are extensions

C = TypeVar("C", bound=type)
T = TypeVar("T", bound=type)  # what a registry holds, such as `type[DatasetKind]`


class Registry(MutableMapping[str, T], Generic[T]):
    """A mutable mapping that imports the modules of `package`, what users edit, and the extensions, when first read.

    Writing (`registry["name"] = cls`, `@registry.register("name")`) imports nothing, so the command line can be built
    without torch. `field` is the key of the config that holds such a name; messages begin with it.
    """

    def __init__(self, field: str, package: str) -> None:
        self.field = field
        self._package = package
        self._discovered = False
        self._classes: dict[str, T] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator: file the class under `name`. Raises ConfigError if another class has that name."""

        def enter(cls: C) -> C:
            known = self._classes.get(name)
            if known is not None and known.__qualname__ != cls.__qualname__:
                raise ConfigError(f"{self.field}: {name!r} is already {known.__module__}.{known.__qualname__}")
            self._classes[name] = cast(T, cls)
            return cls

        return enter

    def _discover(self) -> dict[str, T]:
        """The classes after every file had the chance to register its own. Raises ConfigError for a bad extension."""
        if not self._discovered:
            self._discovered = True  # first: the files below may read this registry
            try:
                package = importlib.import_module(self._package)
                for module in sorted(info.name for info in pkgutil.iter_modules(package.__path__)):
                    importlib.import_module(f"{self._package}.{module}")
                for module in EDITED:
                    importlib.import_module(module)
                load_extensions()
            except BaseException:
                self._discovered = False
                raise
        return self._classes

    def __getitem__(self, name: str) -> T:
        classes = self._discover()
        if name not in classes:
            raise KeyError(name)
        return classes[name]

    def get_or_explain(self, name: str) -> T:
        """The class, or a ConfigError with the nearest known name or all of them."""
        classes = self._discover()
        if name not in classes:
            raise ConfigError(f"{self.field}: unknown {name!r}.{hint(name, classes)}")
        return classes[name]

    def __setitem__(self, name: str, cls: T) -> None:
        self._classes[name] = cls

    def __delitem__(self, name: str) -> None:
        del self._discover()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._discover())

    def __len__(self) -> int:
        return len(self._discover())


_loading = threading.Lock()


def load_extensions() -> None:
    """Import every `*.py` of the folders in GOE_EXTENSIONS (separated by `os.pathsep`) that is not imported yet.

    The files come in the order of the folders and of their names; each is executed once per process. Raises
    ConfigError for a folder that is not there and for a file that fails.
    """
    if not _loading.acquire(blocking=False):
        return  # one of these files reads a registry: the call that imports it continues with the others
    try:
        for file in extension_files():
            _import_extension(file)
    finally:
        _loading.release()


def extension_files() -> Iterator[Path]:
    """The files in the folders of GOE_EXTENSIONS. Raises ConfigError for a folder that is not there."""
    for folder in filter(None, os.environ.get(EXTENSIONS_VARIABLE, "").split(os.pathsep)):
        path = Path(folder).expanduser().absolute()
        if not path.is_dir():
            raise ConfigError(f"{EXTENSIONS_VARIABLE}: there is no folder {folder!r}")
        yield from sorted(path.glob("*.py"))


def _import_extension(file: Path) -> None:
    """Execute the file as a module of its own. Raises ConfigError with the file and line that failed."""
    # The path's hash keeps two folders apart and is the same in every process, so that classes can be pickled.
    name = f"{EXTENSION_PREFIX}{hashlib.sha256(str(file).encode()).hexdigest()[:12]}_{file.stem}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # first: pickling and `typing.get_type_hints` look modules up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # it is any code: a script may also end the program
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        where = f"{file}:{lines[-1]}" if lines else file
        raise ConfigError(f"{EXTENSIONS_VARIABLE}: {where}: {type(error).__name__}: {error}") from error


MODEL_TYPE = "model_type"  # the key of a config, and the parameter of a study, that names the model
MODELS_MAP: Registry[Any] = Registry(MODEL_TYPE, "research_eval.models")
LANGUAGE_MODELS: Registry[Any] = Registry(MODEL_TYPE, "research_eval.models.language")
SYNTHETIC_DATASETS: Registry[Any] = Registry("dataset_name", "research_eval.datasets")
TASKS: Registry[Any] = Registry("task", "research_eval.tasks")
CHOICES: Registry[Any] = Registry("router_mode", "research_eval.layers.path")
DISPATCHERS: Registry[Any] = Registry("dispatcher", "research_eval.layers")


CLASSIFICATION = "classification"  # the task of most data: its labels are class numbers
NEXT_TOKEN = "next_token"  # noqa: S105 - the task of running text


def models_for(task: str) -> Registry[Any]:
    """The models that can be trained for a task: MODELS_MAP, or for running text LANGUAGE_MODELS."""
    return LANGUAGE_MODELS if task == NEXT_TOKEN else MODELS_MAP


class Registered:
    """Annotation of a text parameter whose values are the names in a registry: `Annotated[str, Registered(CHOICES)]`.

    The names are looked up when a value is checked and when the JSON Schema is made, so that importing a module that
    declares such a parameter imports nothing else.
    """

    def __init__(self, registry: Registry[Any]) -> None:
        self.registry = registry

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        from pydantic_core import PydanticKnownError, core_schema

        def known(name: Any) -> Any:
            if not isinstance(name, str) or name not in self.registry:
                raise PydanticKnownError("literal_error", {"expected": " or ".join(map(repr, self.registry))})
            return name

        return core_schema.no_info_before_validator_function(known, core_schema.str_schema())

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: Any) -> dict[str, Any]:
        return {"enum": list(self.registry), "type": "string"}
