"""Learning curves of a run as geometry: rows of metrics in, panels that a page can draw out.

Pure. The page draws a panel as inline SVG, so that it needs neither scripts nor the network.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from alphagrpo_jax.runtime.results import exact_kinds

LABEL_GAP = 15  # between two labels, at least
SMOOTH = 9  # steps that a training curve is averaged over
MIN_SMOOTHED = 2 * SMOOTH  # points, below which the raw curve is clear enough
MAX_X_TICKS, MAX_Y_TICKS = 6, 6

Point = tuple[float, float]


class Frame(NamedTuple):
    """Sizes of a panel, in its own units; labels stand to the right of the axes."""

    width: int = 520
    height: int = 270
    x_min: int = 44  # of the axes
    x_max: int = 380
    y_min: int = 14
    y_max: int = 236
    colors: int = 6


FRAME = Frame()


class Tick(NamedTuple):
    """A mark of an axis."""

    at: float
    text: str


class Dot(NamedTuple):
    """A value of a curve, and what it says when pointed at."""

    x: float
    y: float
    words: str


class PlottedLine(NamedTuple):
    """A curve."""

    label: str
    value: str  # the last, as it is
    color: int  # below `Frame.colors`
    path: str  # "x,y x,y ..."
    raw: str  # the same before smoothing; empty if it was not smoothed
    dots: tuple[Dot, ...]  # of a curve that was not smoothed
    label_y: float


class Panel(NamedTuple):
    """A picture of curves with common axes."""

    title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[PlottedLine, ...]


def panels(rows: Sequence[Mapping[str, Any]]) -> tuple[Panel, ...]:
    """Returns the panels of a run: reward and exact score, in mixed runs by task as well.

    Args:
      rows: of metrics.jsonl, in order; a panel without a single value is left out.
    """
    names = {key for row in rows for key in row}
    tasks = sorted(
        key.removesuffix("/eval/reward/mean") for key in names if key.endswith("/eval/reward/mean")
    )
    kinds = sorted({kind for row in rows for kind in exact_kinds(row)})
    exact_by_kind = {"all": "eval/exact_all"} | {kind: f"eval/exact_all/{kind}" for kind in kinds}
    if tasks:

        def by_task(metric: str) -> dict[str, str]:
            return {"all": metric} | {task: f"{task}/{metric}" for task in tasks}

        plan = {
            "Reward in training, by task": by_task("reward/mean"),
            "Reward on held-out prompts, by task": by_task("eval/reward/mean"),
            "Exact: held-out prompts fully right, by task": by_task("eval/exact_all"),
            "Exact: held-out prompts fully right, by kind": exact_by_kind if kinds else {},
        }
    else:
        plan = {
            "Reward": {"in training": "reward/mean", "held-out": "eval/reward/mean"},
            "Exact: held-out prompts fully right": exact_by_kind,
        }
    built = (_panel(title, series, rows) for title, series in plan.items())
    return tuple(panel for panel in built if panel is not None)


def smooth(points: Sequence[Point], window: int = SMOOTH) -> list[Point]:
    """Averages each value with its neighbors, `window` values in all, fewer at the ends."""
    half = window // 2
    smoothed = []
    for index, (step, _) in enumerate(points):
        window_values = [value for _, value in points[max(0, index - half) : index + half + 1]]
        smoothed.append((step, math.fsum(window_values) / len(window_values)))
    return smoothed


def ticks(low: float, high: float, count: int, *, integers: bool = False) -> list[float]:
    """Returns at most `count` round numbers, evenly spaced, that enclose a range.

    Args:
      low, high: the range.
      count: at least 2.
      integers: whether they must be whole numbers.
    """
    if high <= low:
        high = low + 1.0
    exponent = math.floor(math.log10((high - low) / count))
    for factor in (1, 2, 5, 10, 20, 50, 100):
        width = factor * 10.0**exponent
        first, last = math.floor(low / width + 1e-9), math.ceil(high / width - 1e-9)
        if last - first + 1 <= count and not (integers and width < 1):
            break
    return [round(number * width, 10) for number in range(first, last + 1)]


def _panel(
    title: str, series: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> Panel | None:
    points = {
        label: [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        for label, name in series.items()
    }
    points = {label: curve for label, curve in points.items() if curve}
    if not points:
        return None
    steps = [step for curve in points.values() for step, _ in curve]
    values = [value for curve in points.values() for _, value in curve]
    margin = 0.02 if min(values) == max(values) else 0.0
    low, high = min(values) - margin, max(values) + margin
    y_ticks = ticks(max(low, 0.0) if min(values) >= 0 else low, high, MAX_Y_TICKS)
    x_ticks = ticks(0, max(steps), MAX_X_TICKS, integers=True)

    def project(point: Point) -> Point:
        x = (point[0] - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        y = (point[1] - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return round(FRAME.x_min + x * (FRAME.x_max - FRAME.x_min), 1), round(
            FRAME.y_max - y * (FRAME.y_max - FRAME.y_min), 1
        )

    heights = label_heights({label: project(curve[-1])[1] for label, curve in points.items()})
    lines = []
    for label, curve in points.items():
        # Held-out results stay as they are: each is a mean over many prompts already.
        smoothed = "eval/" not in series[label] and len(curve) >= MIN_SMOOTHED
        plotted = smooth(curve) if smoothed else curve
        lines.append(
            PlottedLine(
                label=label,
                value=f"{curve[-1][1]:.3f}",
                color=list(series).index(label) % FRAME.colors,
                path=_path(map(project, plotted)),
                raw=_path(map(project, curve)) if smoothed else "",
                dots=() if smoothed else tuple(Dot(*project(p), _words(label, p)) for p in curve),
                label_y=heights[label],
            )
        )
    decimals = max((len(f"{tick:g}".partition(".")[2]) for tick in y_ticks), default=0)
    return Panel(
        title,
        tuple(Tick(project((tick, y_ticks[0]))[0], f"{tick:g}") for tick in x_ticks),
        tuple(Tick(project((x_ticks[0], tick))[1], f"{tick:.{decimals}f}") for tick in y_ticks),
        tuple(lines),
    )


def _path(points: Iterable[Point]) -> str:
    return " ".join(f"{x},{y}" for x, y in points)


def _words(label: str, point: Point) -> str:
    return f"{label}, step {point[0]}: {point[1]:.3f}"


def label_heights(wanted: Mapping[str, float]) -> dict[str, float]:
    """Moves labels down where they would lie on each other, and up again at the bottom."""
    heights: dict[str, float] = {}
    last = -math.inf
    for label, height in sorted(wanted.items(), key=lambda item: item[1]):
        last = heights[label] = max(height, last + LABEL_GAP)
    limit = math.inf
    for label in reversed(heights):
        limit = heights[label] = min(heights[label], limit - LABEL_GAP, FRAME.y_max)
    return heights
