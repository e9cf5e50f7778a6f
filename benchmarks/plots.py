"""The figures as pictures: SVG that is readable on light and on dark background."""

from pathlib import Path

from .contenders import NAMES

FOLDER = Path(__file__).resolve().parent

# Of medium lightness, all of them: on white and on black.
_GREY = "#808080"
_COLOURS = {
    "a": "#3b8fd6",
    "c": "#d9822b",
    "d": "#9b6bd1",
    "e": "#2ba065",
    "e-users": "#4fb3a9",
    "e-own": "#c9679a",
    "e-direct": "#7ab648",
    "floor": "#999999",
}


def draw(results):
    """Write a file for each part that there are figures for."""
    # Only now: it takes a second to load, and what is measured does not need it.
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "bus_alt_connection",
            "font.family": "sans-serif",
            "font.size": 10,
            "figure.facecolor": "none",
            "axes.facecolor": "none",
            "savefig.facecolor": "none",
            "legend.frameon": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            **dict.fromkeys(
                ["text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color"],
                _GREY,
            ),
        }
    )
    for name, draw_one in _PLOTS.items():
        figures = results["parts"].get(name, {}).get("figures")
        if figures:
            draw_one(figures)


def _axes(columns, titles, height=3.4):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(4.6 * columns, height), squeeze=False, layout="constrained")
    for one, title in zip(axes[0], titles):
        one.set_title(title, fontsize=10)
        one.grid(True, color=_GREY, alpha=0.25, linewidth=0.6)
    return figure, axes[0]


def _save(figure, name):
    from matplotlib import pyplot

    path = FOLDER / (name + ".svg")
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    # matplotlib leaves blanks at the ends of lines.
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def _latency(figures):
    variants = [name for name in figures if "curve" in figures[name].get("a", {})]
    variants = [name for name in variants if name.startswith("19.0")] or variants
    if not variants:
        return
    figure, axes = _axes(len(variants), ["Odoo %s" % name for name in variants])
    for one, name in zip(axes, variants):
        for key, colour in _COLOURS.items():
            values = figures[name].get(key, {}).get("curve")
            if values:
                width = 2.2 if key == "e" else 1.4
                one.plot(values, range(101), color=colour, linewidth=width, label=NAMES[key], zorder=3 - (key != "e"))
        # The slowest few would squeeze all others.
        right = max(figures[name][key]["curve"][97] for key in "ae" if "curve" in figures[name].get(key, {}))
        one.set_xlim(0, right * 1.15)
        one.set_xlabel("ms from COMMIT of the NOTIFY to the client")
    axes[0].set_ylabel("% of the pushes arrived")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=2 if len(axes) == 1 else 3)
    _save(figure, "latency")


def _sharing(figures):
    figure, axes = _axes(len(figures), ["Odoo %s" % name for name in figures])
    lines = {"guest": "e", "beside the guest": "e-own"}
    for one, found in zip(axes, figures.values()):
        for role, key in lines.items():
            one.plot(found[role]["curve"], range(101), color=_COLOURS[key], linewidth=1.8, label=role)
        one.set_xlim(0, max(found[role]["curve"][97] for role in lines) * 1.15)
        one.set_xlabel("ms from COMMIT of the NOTIFY to the client")
    axes[0].set_ylabel("% of the pushes arrived")
    axes[0].legend(["through a host", "own connection"], fontsize=8, loc="lower right")
    _save(figure, "sharing")


def _outage(figures):
    mine = figures.get("19.0", {})
    keys = [key for key in ("c", "e") if "timeline" in mine.get(key, {})]
    if not keys:
        return
    figure, axes = _axes(1, ["Odoo 19.0 prefork: the listening backend is killed at 0 s"], 3.2)
    for key in keys:
        arrived = sorted(at for _, at in mine[key]["timeline"] if at is not None)
        axes[0].step([*arrived, 57], [*range(1, len(arrived) + 1), len(arrived)], color=_COLOURS[key], linewidth=2,
                     where="post", label=NAMES[key])  # fmt: skip
    sent = sorted(at for at, _ in mine[keys[-1]]["timeline"])
    axes[0].plot(sent, range(1, len(sent) + 1), color=_GREY, linewidth=1, linestyle=":", label="sent")
    axes[0].set_xlabel("seconds since the kill")
    axes[0].set_ylabel("messages delivered")
    axes[0].legend(fontsize=8, loc="upper left")
    figure.set_size_inches(7.5, 3.2)
    _save(figure, "outage")


def _connections(figures):
    counts = {
        key: [(int(name.split()[0]), found) for name, found in figures[key].items() if name.endswith("instances")]
        for key in figures
    }
    counts = {key: found for key, found in counts.items() if found}
    if not counts:
        return
    titles = ["server connections under load", "of them direct, not from PgBouncer"]
    figure, axes = _axes(2, titles)
    for key, found in counts.items():
        for one, what in zip(axes, ("connections", "direct")):
            if what == "direct" and key == "a":
                continue  # all of them are
            points = [(number, row[what]) for number, row in found]
            one.plot(*zip(*points), color=_COLOURS[key], marker="o", linewidth=2, label=NAMES[key])
    for one in axes:
        one.set_xlabel("instances of Odoo (10 workers, gevent, 2 cron)")
        one.set_ylim(bottom=0)
        one.set_xticks(sorted({number for found in counts.values() for number, _ in found}))
    axes[0].legend(fontsize=8, loc="upper left")
    _save(figure, "connections")


def _flood(figures):
    counts = {int(name.split()[0]): found for name, found in figures.items()}
    figure, axes = _axes(1, ["NOTIFYs that PostgreSQL takes beside idle instances of Odoo 19.0"], 3.2)
    for key, colour in _COLOURS.items():
        points = [
            (count, found[key]["notifies_per_second"]["median"]) for count, found in counts.items() if key in found
        ]
        if points:
            style = {"linestyle": ":"} if key == "floor" else {"marker": "o"}
            axes[0].plot(*zip(*points), color=colour, linewidth=2, label=NAMES[key], **style)
    axes[0].set_xlabel("instances of Odoo (gevent, 2 cron)")
    axes[0].set_ylabel("NOTIFYs a second")
    axes[0].set_ylim(bottom=0)
    axes[0].set_xticks(sorted(counts))
    figure.set_size_inches(7.5, 3.2)
    figure.legend(fontsize=8, loc="outside right upper")
    _save(figure, "flood")


def _listeners(figures):
    counts = {int(name.split()[0]): found for name, found in figures.items() if name != "versions"}
    figure, axes = _axes(1, ["NOTIFYs that PostgreSQL takes beside bare listeners"], 3.2)
    measured = [name for name in figures["versions"] if name in counts[0]]
    for name, colour in zip(measured, (_COLOURS["a"], _COLOURS["d"], _COLOURS["e"])):
        for what, style in (("same_channel", "-"), ("other_channel", ":")):
            # There is no place for 0 where each step is a multiple.
            points = [(count, found[name][what]["median"]) for count, found in counts.items() if count]
            label = "PostgreSQL %s, on %s channel" % (name, "the same" if what == "same_channel" else "another")
            axes[0].loglog(*zip(*points), color=colour, linestyle=style, marker="o", markersize=4, label=label)
    axes[0].set_xlabel("backends that listen")
    axes[0].set_ylabel("NOTIFYs a second")
    shown = sorted(count for count in counts if count)
    axes[0].set_xticks(shown, map(str, shown))
    axes[0].minorticks_off()
    figure.set_size_inches(7.5, 3.2)
    figure.legend(fontsize=8, loc="outside right upper")
    _save(figure, "listeners")


_PLOTS = {
    "latency": _latency,
    "sharing": _sharing,
    "outage": _outage,
    "connections": _connections,
    "flood": _flood,
    "listeners": _listeners,
}
