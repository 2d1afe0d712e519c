"""Train and compare dense, Mixture-of-Experts and Graph-of-Experts sequence models.

`research_eval.load(run)` gives the trained model of a run (docs/getting_started.md), and `research_eval.trace(model)`
records what the routers of any torch model decide (docs/trace.md).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from research_eval.generation.trained import load as load
    from research_eval.tracing.microscope import trace as trace

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first used: `import research_eval` does not wait for it."""
    if name == "load":
        from research_eval.generation.trained import load

        return load
    if name == "trace":
        from research_eval.tracing.microscope import trace

        return trace
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
