"""Parallel coordinates as plain SVG: hundreds of trials appear at once, also on a machine without a graphics card.

The page draws a line for each trial; a short script lets the reader choose trials along the axes.
"""

from __future__ import annotations

import html

from research_eval.analysis.figures import INK
from research_eval.analysis.study_axes import Axis
from research_eval.analysis.study_charts import COLOURS, ParallelCoordinates, StudyCharts
from research_eval.analysis.study_texts import described, objective_label

WIDTH, HEIGHT = 1240, 380
LEFT, RIGHT, TOP, BOTTOM = 40, 175, 84, 18  # room around the axes; on the right is the colour bar
STRIPES = 40  # of the colour bar
BOLD = 20  # at most so many of the best lines are bold
STYLE = """<style>
svg.lines { width: 100%; height: auto; display: block; font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; }
svg.lines .trial { fill: none; pointer-events: stroke; }
svg.lines .trial:hover { stroke-width: 4; stroke-opacity: 1; }
svg.lines .trial.out { stroke: #d5d5d5 !important; stroke-opacity: .25; }
svg.lines text { fill: #222; paint-order: stroke; stroke: #fff; stroke-width: 3px; stroke-opacity: .85; }
svg.lines .tick { font-size: 11px; pointer-events: none; }
svg.lines .grip { fill: transparent; cursor: ns-resize; }
svg.lines .chosen { fill: #0072B2; fill-opacity: .25; pointer-events: none; }
</style>"""
SCRIPT = """<script>
"use strict";
for (const svg of document.querySelectorAll("svg.lines")) {
  const top = Number(svg.dataset.top), height = Number(svg.dataset.height), ranges = new Map();
  const trials = [...svg.querySelectorAll(".trial")].map(line => [line, line.dataset.at.split(" ").map(Number)]);
  const count = svg.nextElementSibling;
  const place = event => {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    return Math.min(1.05, Math.max(-0.05, 1 - (point.y - top) / height));
  };
  const show = () => {
    let left = 0;
    for (const [line, at] of trials) {
      const out = [...ranges].some(([axis, [low, high]]) => at[axis] < low || at[axis] > high);
      line.classList.toggle("out", out);
      left += !out;
    }
    count.textContent = ranges.size ? `${left} of ${trials.length} trials chosen` : "";
  };
  for (const grip of svg.querySelectorAll(".grip")) {
    const axis = Number(grip.dataset.axis), box = grip.nextElementSibling;
    let start = null;
    grip.addEventListener("pointerdown", event => { start = place(event); grip.setPointerCapture(event.pointerId); });
    grip.addEventListener("pointermove", event => {
      if (start === null) return;
      const now = place(event), low = Math.min(start, now), high = Math.max(start, now);
      if (high - low < 0.01) return;
      ranges.set(axis, [low, high]);
      box.setAttribute("y", top + (1 - high) * height);
      box.setAttribute("height", (high - low) * height);
      show();
    });
    grip.addEventListener("pointerup", event => {
      if (start !== null && Math.abs(place(event) - start) < 0.01) {
        ranges.delete(axis);
        box.setAttribute("height", 0);
        show();
      }
      start = null;
    });
  }
}
</script>"""


def lines_svg(charts: StudyCharts, lines: ParallelCoordinates) -> str:
    """The lines of one model type, and below them a line of text for the number of chosen trials."""
    height = HEIGHT - TOP - BOTTOM
    step = (WIDTH - LEFT - RIGHT) / max(len(lines.axes) - 1, 1)
    across = [LEFT + step * place for place in range(len(lines.axes))]
    order = sorted(range(len(lines.records)), key=lambda trial: lines.goodness[trial])  # the best last, on top
    bold = set(order[-max(1, min(BOLD, len(order) // 10)) :])
    faint = max(0.3, min(0.7, 60 / len(order)))
    places = [lines.places(axis) for axis in lines.axes]
    drawn = []
    for trial in order:
        at = [column[trial] for column in places]
        corners = " L".join(f"{x:.0f} {TOP + (1 - y) * height:.1f}" for x, y in zip(across, at, strict=True))
        said = html.escape("\n".join(described(lines.records[trial], charts.objectives)))
        look = f'stroke="{colour_of(lines.goodness[trial])}" stroke-width="{2 if trial in bold else 1.1}"'
        look += f' stroke-opacity="{0.95 if trial in bold else faint:.2f}"'
        values = " ".join(f"{y:.3f}" for y in at)
        drawn.append(f'<path class="trial" {look} data-at="{values}" d="M{corners}"><title>{said}</title></path>')
    axes = [_axis(axis, x, place, step) for place, (axis, x) in enumerate(zip(lines.axes, across, strict=True))]
    title = html.escape(lines.title)
    return (
        f'<svg class="lines" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}" data-top="{TOP}" '
        f'data-height="{height}">{"".join(drawn)}{"".join(axes)}{_colour_bar(charts, lines)}</svg>\n<p></p>'
    )


def _axis(axis: Axis, x: float, place: int, step: float) -> str:
    """An upright axis with its name, its ticks, and the strip along which the reader chooses trials."""
    height = HEIGHT - TOP - BOTTOM
    turn = f' transform="rotate(-18 {x:.0f} {TOP - 14})"' if step < 130 else ""
    marks = [
        f'<path stroke="{INK}" d="M{x - 3:.0f} {TOP + (1 - at) * height:.1f} h6"/>'
        f'<text class="tick" x="{x + 6:.0f}" y="{TOP + (1 - at) * height + 4:.1f}">{html.escape(text)}</text>'
        for at, text in axis.ticks
    ]
    return (
        f'<path stroke="{INK}" d="M{x:.0f} {TOP} v{height}"/>{"".join(marks)}'
        f'<text x="{x:.0f}" y="{TOP - 14}"{turn}>{html.escape(axis.label)}</text>'
        f'<rect class="grip" data-axis="{place}" x="{x - 9:.0f}" y="{TOP - 8}" width="18" height="{height + 16}"/>'
        f'<rect class="chosen" x="{x - 6:.0f}" width="12" height="0"/>'
    )


def _colour_bar(charts: StudyCharts, lines: ParallelCoordinates) -> str:
    """What the colours mean: values of the first objective."""
    x, height = WIDTH - 70, HEIGHT - TOP - BOTTOM
    step = height / STRIPES
    stripes = [
        f'<rect x="{x}" y="{TOP + height - (place + 1) * step:.2f}" width="12" height="{step + 0.5:.2f}" '
        f'fill="{colour_of((place + 0.5) / STRIPES)}"/>'
        for place in range(STRIPES)
    ]
    marks = [
        f'<text class="tick" x="{x + 18}" y="{TOP + (1 - at) * height + 4:.1f}">{html.escape(text)}</text>'
        for at, text in lines.legend
    ]
    name = html.escape(objective_label(charts.objectives[0]))
    return f'{"".join(stripes + marks)}<text x="{WIDTH - 4}" y="14" text-anchor="end">colour: {name}</text>'


def colour_of(goodness: float) -> str:
    """The colour of a line: the first of `COLOURS` for the worst trial (0), the last one for the best (1)."""
    place = min(max(goodness, 0.0), 1.0) * (len(COLOURS) - 1)
    left = min(int(place), len(COLOURS) - 2)
    low, high = (bytes.fromhex(COLOURS[left + more][1:]) for more in (0, 1))
    mixed = [round(one + (place - left) * (other - one)) for one, other in zip(low, high, strict=True)]
    return f"#{bytes(mixed).hex()}"
