"""Train and compare dense, Mixture-of-Experts and Graph-of-Experts sequence models.

`research_eval.load(run)` gives the trained model of a run (docs/getting_started.md).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from research_eval.generation.trained import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `load` when it is first used: it needs torch, for which `import research_eval` does not wait."""
    if name == "load":
        from research_eval.generation.trained import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
