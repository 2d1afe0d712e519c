"""The shape of the package, read from its source: who imports whom, how long things are, and what is explained.

Every message says what is wrong and what to do about it. Nothing of the package is imported here.
"""

from __future__ import annotations

import ast
import graphlib
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

PACKAGE = "research_eval"
ROOT = Path(__file__).resolve().parent.parent / PACKAGE
FILES = sorted(ROOT.rglob("*.py"))

MAX_FILE_LINES = 500
MAX_FILE = {"models/goe_original.py": 250, "experiment.py": 200}
MAX_EXPERIMENT_IMPORTS = 20  # names of ours that experiment.py imports
MAX_ROOT_MODULES = 14
MAX_PARAMETERS = 12  # of a constructor, without self
MAX_FIT_LINES = 80
MIN_EXPLAINED = 0.15  # share of lines with a comment or in a docstring
PLOTTING = ("matplotlib", "plotly", f"{PACKAGE}.analysis")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    parts = [PACKAGE, *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_for_type_checkers(node: ast.AST) -> bool:
    """Whether it is `if TYPE_CHECKING:`."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below, those inside functions too, without what only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and is_for_type_checkers(child):
            for other in child.orelse:
                yield other
                yield from executed(other)
            continue
        yield child
        yield from executed(child)


@cache
def imported_names(path: Path) -> tuple[tuple[str, int], ...]:
    """What a file imports, as full names with their lines: "torch.nn.functional", "research_eval.files.write".

    `importlib.import_module("...")` with a literal counts as an import.
    """
    found: list[tuple[str, int]] = []
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in executed(tree(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            found += [(f"{base}.{alias.name}", node.lineno) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "import_module" and node.args:
            literal = node.args[0]
            if isinstance(literal, ast.Constant) and isinstance(literal.value, str):
                found.append((literal.value, node.lineno))
    return tuple(found)


def own_module(name: str) -> str | None:
    """The module of ours that a full name is or is in."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name if name and name != PACKAGE else None


@cache
def import_graph() -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports, and the packages that are entered on the way.

    The `__init__` of the packages that a module is in itself are left out: a package may gather its own modules.
    """
    graph: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        found = set()
        for full_name, _ in imported_names(path):
            target = own_module(full_name)
            while target is not None and target != PACKAGE:
                if target != name and not name.startswith(f"{target}."):
                    found.add(target)
                target = target.rpartition(".")[0]
        graph[name] = found
    return graph


# ------------------------------------------------------------------------------------------------------------- imports


def test_no_module_imports_itself_over_others() -> None:
    try:
        graphlib.TopologicalSorter(import_graph()).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1][::-1]  # graphlib names the imported module first
        lines = []
        for importer, imported in pairwise(circle):
            places = [
                f"{relative(MODULES[importer])}:{line}"
                for full_name, line in imported_names(MODULES[importer])
                if f"{full_name}.".startswith(f"{imported}.")
            ]
            lines.append(f"  {importer} imports {imported} ({', '.join(places)})")
        pytest.fail(
            "these modules import each other in a circle (imports inside functions count):\n"
            + "\n".join(lines)
            + "\nMove what both ends need into a module below them, or hand it over as an argument."
        )


def imports_of(folder: str, *targets: str) -> list[str]:
    """Where files below a folder (or one file) import one of the modules."""
    return [
        f"{relative(path)}:{line} imports {name}"
        for path in FILES
        if f"{relative(path)}/".startswith(f"{folder}/")
        for name, line in imported_names(path)
        if any(f"{name}.".startswith(f"{target}.") for target in targets)
    ]


@pytest.mark.parametrize("folder", ["layers", "models"])
def test_layers_and_models_do_not_know_the_analysis(folder: str) -> None:
    found = imports_of(folder, f"{PACKAGE}.analysis")
    assert not found, f"{found}: move what they share to routing/, or let analysis/ do it from what is recorded"


def test_the_experiment_draws_no_pictures() -> None:
    found = imports_of("experiment.py", *PLOTTING)
    assert not found, f"{found}: pictures are a step of its own after the run is stored; call it through runs/"


def test_the_experiment_is_put_together_of_few_parts() -> None:
    names = [name for name, _ in imported_names(ROOT / "experiment.py") if own_module(name) is not None]
    assert len(names) <= MAX_EXPERIMENT_IMPORTS, (
        f"experiment.py imports {len(names)} names of {PACKAGE}, {MAX_EXPERIMENT_IMPORTS} at most: "
        f"move what uses {', '.join(name.removeprefix(f'{PACKAGE}.') for name in names[MAX_EXPERIMENT_IMPORTS:])} "
        "into the module whose job it is"
    )


# ---------------------------------------------------------------------------------------------------------------- size


def test_no_file_is_long() -> None:
    """A file has one job, and a reader sees all of it."""
    lengths = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    too_long = {
        name: f"{length} lines, {MAX_FILE.get(name, MAX_FILE_LINES)} at most"
        for name, length in lengths.items()
        if length > MAX_FILE.get(name, MAX_FILE_LINES)
    }
    assert not too_long, f"{too_long}: split each by its jobs, and keep its documented names importable"
    assert lengths.keys() >= MAX_FILE.keys()


def test_few_modules_lie_beside_the_packages() -> None:
    names = sorted(path.name for path in ROOT.glob("*.py"))
    assert len(names) <= MAX_ROOT_MODULES, (
        f"{len(names)} modules lie directly in {PACKAGE}/, {MAX_ROOT_MODULES} at most: {', '.join(names)}. "
        "Move those without documented name into the package whose job they do."
    )


def functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for child in ast.walk(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child


def test_no_constructor_takes_many_arguments() -> None:
    """Fields of a dataclass or of a pydantic model are no parameters: such a group is one argument."""
    found = []
    for path in FILES:
        for function in functions(tree(path)):
            arguments = function.args
            count = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs) - 1
            count += sum(star is not None for star in (arguments.vararg, arguments.kwarg))
            if function.name == "__init__" and count > MAX_PARAMETERS:
                found.append(f"{relative(path)}:{function.lineno} has {count}")
    assert not found, (
        f"constructors with more than {MAX_PARAMETERS} parameters: {'; '.join(found)}. Put those that belong together "
        "into a frozen dataclass, whose fields stay flat in JSON."
    )


def test_the_training_loop_is_a_page() -> None:
    loops = [function for function in functions(tree(ROOT / "training" / "fit.py")) if function.name == "fit"]
    assert loops, "training/fit.py has no function `fit`, which is documented: keep the loop there"
    (loop,) = loops
    length = (loop.end_lineno or loop.lineno) - loop.lineno + 1
    assert length <= MAX_FIT_LINES, f"fit is {length} lines long, {MAX_FIT_LINES} at most: give its phases names"
    assert not any(isinstance(node, ast.Yield | ast.YieldFrom) for node in ast.walk(loop)), "fit is a plain function"


# ---------------------------------------------------------------------------------------------------------- explanation


def explained_lines(path: Path) -> set[int]:
    """The lines of a file that explain: those with a comment, alone or after code, and those of docstrings.

    A docstring is the string that a module, class or function begins with, or that stands after an assignment, which
    documents the attribute. Comments for tools (noqa, type: ignore) explain nothing.
    """
    lines: set[int] = set()
    source = path.read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not re.match(r"#\s*(noqa|type:|ruff:|mypy:)", token.string):
            lines.add(token.start[0])
    for node in ast.walk(tree(path)):
        for statement in getattr(node, "body", []) if isinstance(getattr(node, "body", None), list) else []:
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                lines |= set(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))
    return lines


def test_the_code_is_explained() -> None:
    """Comments and docstrings take their share of all lines, blank ones included, over the whole package."""
    counts = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    explained = {path: len(explained_lines(path)) for path in FILES}
    share = sum(explained.values()) / sum(counts.values())
    missing = sorted(FILES, key=lambda path: explained[path] - MIN_EXPLAINED * counts[path])[:10]
    assert share >= MIN_EXPLAINED, (
        f"comments and docstrings are {share:.1%} of the lines, {MIN_EXPLAINED:.0%} at least: say why, with shapes, "
        "units, errors and sources. Most is missing in "
        + ", ".join(f"{relative(path)} ({explained[path]} of {counts[path]})" for path in missing)
    )


# ------------------------------------------------------------------------------------------ one place for each thing


def private_of_optuna(path: Path) -> list[str]:
    """Private attributes of Optuna's trials, studies and storages: they change without notice."""
    uses_optuna = any(name.split(".")[0] == "optuna" for name, _ in imported_names(path))
    pattern = re.compile(r"_(trial_id|study_id|storage|backend|cached_frozen_trial|get_stale_trial_ids|datetime_start)")
    return [
        f"{relative(path)}:{node.lineno} {ast.unparse(node)}"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute)
        and re.fullmatch(r"_[a-z]\w*", node.attr)
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
        and (pattern.fullmatch(node.attr) or (uses_optuna and is_of_optuna(node.value)))
    ]


def is_of_optuna(value: ast.AST) -> bool:
    """Whether an expression is called after an object of Optuna's: `trial._x`, `desk.study._x`, `optuna.x._y`."""
    last = ast.unparse(value).split(".")[-1]
    return re.search(r"(^|_)(trial|study|storage)\d*$", last) is not None or ast.unparse(value).startswith("optuna.")


def test_one_file_knows_the_inside_of_optuna() -> None:
    found = {relative(path): places for path in FILES if (places := private_of_optuna(path))}
    assert len(found) <= 1, (
        f"private attributes of Optuna in {len(found)} files: {found}. Let one file, the adapter, offer what is needed "
        "under a public name."
    )


def test_suggestions_for_misspelt_words_are_made_in_one_file() -> None:
    found = [place for path in FILES if path.name != "wording.py" for place in imports_of(relative(path), "difflib")]
    assert not found, f"{found}: call nearest, did_you_mean or hint of {PACKAGE}.wording"


def layer_files() -> list[Path]:
    return [path for path in FILES if relative(path).startswith("layers/")]


def test_layers_use_the_public_interface_of_torch() -> None:
    found = [
        f"{relative(path)}:{node.lineno} {ast.unparse(node)}"
        for path in layer_files()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch._C.")
    ]
    found += imports_of("layers", "torch._C")
    assert not found, f"{found}: torch._C changes without notice; find a public function, or pass the state along"


def test_layers_have_no_state_of_the_process() -> None:
    found = [
        f"{relative(path)}:{node.lineno} {ast.unparse(node)}"
        for path in layer_files()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Global)
    ]
    assert not found, f"{found}: two models of one process would share it; keep it in an object that is passed along"
