"""The figures as pictures: SVG that is readable on light and on dark background."""

import matplotlib
import numpy
from matplotlib import pyplot

from . import connections, flood, listeners, outage
from .contenders import NAMES
from .report import FOLDER

# Colours of medium lightness are readable on white and on black.
_GREY = "#808080"
_COLOURS = {
    "a": "#3b8fd6",
    "c": "#d9822b",
    "d": "#9b6bd1",
    "e": "#2ba065",
    "e-own": "#c9679a",
    "e-direct": "#7ab648",
    "floor": "#999999",
    "follower": "#2ba065",
    "beside the follower": "#c9679a",
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bus_alt_connection",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    **dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], _GREY),
}


def draw(results):
    """Write a picture for each part that there are figures for."""
    matplotlib.use("svg")
    for part, draw_part in _PLOTS.items():
        tables = results["parts"].get(part, {}).get("tables")
        if tables:
            with matplotlib.rc_context(_STYLE):
                _save(draw_part(tables), FOLDER / (part + ".svg"))


def _axes(titles, x_label, y_label):
    """Return a figure and its axes: side by side, with a title each."""
    figure, axes = pyplot.subplots(1, len(titles), figsize=(9.2, 3.4), squeeze=False, layout="constrained")
    for panel, title in zip(axes[0], titles):
        panel.set_title(title)
        panel.set_xlabel(x_label)
    axes[0][0].set_ylabel(y_label)
    return figure, axes[0]


def _save(figure, path):
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    # matplotlib leaves blanks at the ends of lines.
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def _line(axes, key, x, y, **style):
    axes.plot(x, y, color=_COLOURS[key], label=NAMES.get(key, key), **style)


def _curves(tables):
    """Draw which share of the pushes arrived within which time."""
    figure, axes = _axes(tables, "ms from COMMIT of the NOTIFY to the client", "% of the pushes arrived")
    for panel, rows in zip(axes, tables.values()):
        curves = {row["contender"]: row["_curve"] for row in rows if row["contender"] in _COLOURS}
        for key, curve in curves.items():
            _line(panel, key, curve, range(101))
        # The few slowest pushes would squeeze all others.
        panel.set_xlim(0, 1.15 * max(curve[97] for curve in curves.values()))
    return figure


def _timeline(tables):
    """Draw how many messages were delivered around a kill."""
    title = "Odoo 19.0 prefork: the listening backend is killed at 0 s"
    figure, (axes,) = _axes([title], "seconds since the kill", "messages delivered")
    for row in tables[outage.TITLE]:
        arrived = row.get("_arrived")
        if arrived:
            _line(axes, row["contender"], arrived, range(1, len(arrived) + 1), drawstyle="steps-post")
    return figure


def _by_instances(title, column, unit):
    """Return a function that draws a column against the number of instances, a line for each contender."""

    def draw_part(tables):
        rows = tables[title]
        figure, (axes,) = _axes([title], "instances", unit)
        for key in _COLOURS:
            # The first value of a figure with a spread is the median.
            points = [(row["instances"], numpy.ravel(row[column])[0]) for row in rows if row["contender"] == key]
            if points:
                _line(axes, key, *zip(*points), marker="o")
        axes.set_ylim(bottom=0)
        axes.set_xticks(sorted({row["instances"] for row in rows}))
        return figure

    return draw_part


def _listeners(tables):
    figure, (axes,) = _axes([listeners.TITLE], "backends that listen", "NOTIFYs a second")
    # A logarithmic axis has no 0.
    rows = [row for row in tables[listeners.TITLE] if row["listeners"]]
    counts = [row["listeners"] for row in rows]
    for number, column in enumerate(list(rows[0])[1:]):
        medians = [row[column][0] for row in rows]
        style = {"color": list(_COLOURS.values())[number // 2], "linestyle": "-:"[number % 2], "marker": "."}
        axes.loglog(counts, medians, label="PostgreSQL " + column, **style)
    axes.set_xticks(counts, map(str, counts))
    axes.minorticks_off()
    return figure


_PLOTS = {
    "latency": _curves,
    "sharing": _curves,
    "outage": _timeline,
    "connections": _by_instances(connections.TITLE, "connections", "server connections"),
    "flood": _by_instances(flood.TITLE, "NOTIFY/s", "NOTIFYs a second"),
    "listeners": _listeners,
}
