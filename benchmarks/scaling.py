"""How the cost of a `goe_original` training step grows: curves with fitted exponents, and what idle experts cost.

An exponent b is the slope of a line through log(cost) over log(size): cost ~ size^b. Small sizes are in the fit, so
fixed costs lower it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peers
from timing import NOT_MEASURED, Contestant, Row, Settings, argument_parser, measure, report

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "scaling.png"
BASE = {"width": 128, "inner": 512, "experts": 8, "steps": 3, "length": 64, "batch": 16}
CURVES = {
    "experts": [2, 4, 8, 16, 32, 64],
    "path length": [1, 2, 4, 8],
    "sequence length": [16, 32, 64, 128, 256],
    "batch": [4, 8, 16, 32, 64, 128],
    "width": [32, 64, 128, 256],
}
FIELDS = {"path length": "steps", "sequence length": "length"}
IDLE = (4, 64)  # experts, at the width 128 and a path of 6
TINY_BASE = {"width": 16, "inner": 32, "experts": 4, "steps": 2, "length": 4, "batch": 4}
TINY_CURVES = {"experts": [2, 4], "path length": [1, 2], "sequence length": [4, 8], "batch": [2, 4], "width": [8, 16]}


def step_at(settings: Settings, rate: float | None = 0.0, busy: int | None = None, **changes: int) -> Contestant:
    """A training step of the base shape with some of its sizes changed; without a `rate` no optimiser.

    With `busy` the router chooses among so many experts only, and the others are idle.
    """
    sizes = (TINY_BASE if settings.tiny else BASE) | changes
    if "width" in changes:
        sizes["inner"] = 4 * changes["width"]
    shape = (sizes["width"], sizes["inner"], sizes["experts"], sizes["steps"], sizes["length"], sizes["batch"])
    return peers.goe_contestant(shape, False, True, 0.0, settings, None, rate=rate, busy=busy)()


def exponent(sizes: list[int], costs: list[float]) -> float:
    """The slope of the least-squares line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def curve(name: str, sizes: list[int], seconds: float, settings: Settings) -> Row:
    """Milliseconds per step at each size, and the fits over all sizes and over the two largest."""
    contestants = {str(size): step_at(settings, **{FIELDS.get(name, name): size}) for size in sizes}
    rounds = measure(contestants, seconds, settings)
    costs = [rounds.median(str(size)) for size in sizes]
    return {
        "cost against": name,
        "sizes": sizes,
        "ms per step": [round(1000 * cost, 1) for cost in costs],
        "exponent": exponent(sizes, costs),
        "of the two largest": exponent(sizes[-2:], costs[-2:]),
    }


def idle_experts(seconds: float, settings: Settings) -> list[Row]:
    """What 64 experts cost more than 4: on the same paths, where the others are idle, and where all have samples."""
    few, many = (2, 4) if settings.tiny else IDLE
    shape = {} if settings.tiny else {"steps": 6, "batch": 32}
    contestants = {
        "few": step_at(settings, experts=few, **shape),
        "the same paths": step_at(settings, busy=few, experts=many, **shape),
        "paths through all": step_at(settings, experts=many, **shape),
    }
    rounds = measure(contestants, seconds, settings)
    return [
        {
            "paths": name,
            f"{few} experts, ms": 1000 * rounds.median("few"),
            f"{many} experts, ms": 1000 * rounds.median(name),
            "ratio": rounds.ratio(name, "few"),
        }
        for name in contestants
        if name != "few"
    ]


def draw(rows: list[Row], path: Path) -> None:
    """One small panel per curve, both axes logarithmic, with the fitted line."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(2.1 * len(rows), 2.3), layout="constrained")
        axes = figure.subplots(1, len(rows), sharey=True)
        for panel, row in zip(axes, rows, strict=True):
            sizes, costs = np.array(row["sizes"]), np.array(row["ms per step"])
            line = np.exp(np.polyval(np.polyfit(np.log(sizes), np.log(costs), 1), np.log(sizes)))
            panel.loglog(sizes, line, color="#B0B0B0", linewidth=1)
            panel.loglog(sizes, costs, "o", color="#1F6FB2", markersize=4)
            panel.set_xticks(sizes, [str(size) for size in sizes])
            panel.minorticks_off()
            panel.set_xlabel(row["cost against"])
            panel.set_title(f"exponent {row['exponent']:.2f}", fontsize=8)
        axes[0].set_ylabel("ms per training step")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    given = vars(parser.parse_args())
    picture = given.pop("picture")
    settings = Settings(**given)
    if not settings.available:
        report("scaling", settings, {"Scaling": [{"cost against": name, "exponent": NOT_MEASURED} for name in CURVES]})
        return
    curves = TINY_CURVES if settings.tiny else CURVES
    idle = idle_experts(settings.share(len(curves) + 1), settings)
    rows = [
        curve(name, sizes, settings.share(len(curves) - n), settings) for n, (name, sizes) in enumerate(curves.items())
    ]
    base = TINY_BASE if settings.tiny else BASE
    title = f"goe_original, training step, two layers per expert; base {', '.join(f'{k} {v}' for k, v in base.items())}"
    report("scaling", settings, {title: rows, "Idle experts": idle})
    draw(rows, picture)


if __name__ == "__main__":
    main()
