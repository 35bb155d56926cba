"""Line plots whose lines carry their names: a few are coloured, the others are grey."""

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

COLOURS = ["#1f2933", "#0b7a75", "#e8710a", "#c2185b", "#3f6fd8"]
GREY, GREY_TEXT = "#b8bec6", "#6b7280"
PERCENT = "accuracy (%)"

# Inches. A README shows a picture about 830 pixels wide, so that letters of 9 points are easy to read there.
WIDTH, ROW_HEIGHT = 8.3, 2.75
LINE_HEIGHT = 0.07  # of a name, as a share of the axes


@dataclass
class Panel:
    """One pair of axes. `lines` holds the points of each line under the line's name."""

    title: str
    x_label: str
    y_label: str
    lines: dict[str, list[tuple[float, float]]]


def position_panel(title: str, whole: str, lines: list[dict]) -> Panel:
    """Accuracy in each eighth of the answer or the queries; a short one has no question in some of them."""
    curves = {line["method"]: [(i, y) for i, y in enumerate(line["eighths"], 1) if y is not None] for line in lines}
    return Panel(title, f"eighth of the {whole}", PERCENT, curves)


def check_plot(path: str | None) -> None:
    """Refuse what could not be drawn, before anything runs."""
    if path and Path(path).suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--plot is {path}: it must be .png, .pdf or .svg")
    if path and not find_spec("matplotlib"):
        raise ValueError("--plot: matplotlib is not installed: pip install matplotlib")


def plot(path: str, panels: list[Panel], highlighted: list[str]) -> None:
    """Draw the panels, two in a row. The highlighted names are coloured; of a few names, all are."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    shown = [name for name in highlighted if name in names] if len(names) > len(COLOURS) else names
    colours = dict(zip(shown, COLOURS, strict=False))
    columns = min(2, len(panels))
    rows = (len(panels) + columns - 1) // columns
    with pyplot.rc_context({"font.size": 9, "axes.titlesize": 9.5, "axes.titleweight": "bold"}):
        picture = pyplot.figure(figsize=(WIDTH, rows * ROW_HEIGHT), layout="constrained")
        for number, panel in enumerate(panels, 1):
            draw(picture.add_subplot(rows, columns, number), panel, colours)
        picture.savefig(path, dpi=200)
        pyplot.close(picture)


def draw(ax, panel: Panel, colours: dict[str, str]) -> None:
    """Draw the lines, grey ones first, then write their names at their right ends."""
    for name, points in sorted(panel.lines.items(), key=lambda item: item[0] in colours):
        width = 2 if name in colours else 1
        ax.plot(*zip(*points, strict=True), color=colours.get(name, GREY), linewidth=width, clip_on=False)
    ax.set_title(panel.title, loc="left")
    ax.set(xlabel=panel.x_label, ylabel=panel.y_label)
    ax.set_ylim((0, 102) if panel.y_label == PERCENT else (0, None))
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", alpha=0.3)
    write_names(ax, panel.lines, colours)


def write_names(ax, lines: dict[str, list[tuple[float, float]]], colours: dict[str, str]) -> None:
    """Names to the right of the axes, as high as their lines end; those that would overlap are moved apart."""
    bottom, top = ax.get_ylim()
    ends = sorted(((points[-1], name) for name, points in lines.items()), key=lambda end: -end[0][1])
    heights = moved_apart([(y - bottom) / (top - bottom) for (_, y), _ in ends], LINE_HEIGHT)
    for (point, name), y in zip(ends, heights, strict=True):
        line = {"arrowstyle": "-", "color": colours.get(name, GREY), "linewidth": 0.6, "shrinkA": 1, "shrinkB": 1}
        ax.annotate(
            re.sub(r"[:,]\w+=", ", ", name),  # slide:score=own is written as "slide, own"
            point,
            xytext=(1.09, y),
            textcoords="axes fraction",
            verticalalignment="center",
            color=colours.get(name, GREY_TEXT),
            fontsize=8,
            parse_math=False,  # a file's name may have dollar signs
            fontweight="bold" if name in colours else "normal",
            arrowprops=line | {"relpos": (0, 0.5)},  # the line ends at the left of the name, half way up
        )


def moved_apart(heights: list[float], gap: float) -> list[float]:
    """Falling heights -> falling heights that differ by `gap` or more and do not go below 0."""
    apart = list(heights)
    for i in range(1, len(apart)):
        apart[i] = min(apart[i], apart[i - 1] - gap)
    lowest = 0.0
    for i in reversed(range(len(apart))):
        apart[i] = max(apart[i], lowest)
        lowest = apart[i] + gap
    return apart
