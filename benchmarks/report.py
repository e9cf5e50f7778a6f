"""``results.json``, and the tables made of it."""

import json
import os
import textwrap
from pathlib import Path

from .contenders import NAMES

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results.json"
TABLES = FOLDER / "results.rst"


def load(quick):
    """Return the results to add to: those of the last run, unless that was of the other kind."""
    try:
        results = json.loads(RESULTS.read_text())
        if results["quick"] == quick:
            return results
    except (FileNotFoundError, ValueError, KeyError):
        pass
    return {"quick": quick, "versions": {}, "parts": {}}


def save(results):
    part = RESULTS.with_suffix(".part")
    part.write_text(_json(results) + "\n")
    os.replace(part, RESULTS)


def _json(value, indent=0):
    """Return JSON with each thing that fits on a line on one."""
    whole = json.dumps(value, ensure_ascii=False)
    if len(whole) + indent <= 118 or not isinstance(value, (dict, list)) or not value:
        return whole
    inner = " " * (indent + 1)
    if isinstance(value, dict):
        items = [json.dumps(key, ensure_ascii=False) + ": " + _json(one, indent + 1) for key, one in value.items()]
        return "{\n" + ",\n".join(inner + item for item in items) + "\n" + " " * indent + "}"
    if isinstance(value[0], (int, float)):
        return whole
    return "[\n" + ",\n".join(inner + _json(one, indent + 1) for one in value) + "\n" + " " * indent + "]"


def write_tables(results):
    """Write the tables as reStructuredText."""
    lines = [".. Written by make bench. Do not edit.", "", "=======", "Results", "=======", ""]
    if results["quick"]:
        lines += ["**These are of a quick run, with few samples: they only show that it works.**", ""]
    lines += _grid(["", "version"], [[name, text] for name, text in results["versions"].items()])
    bounds = _bounds(results["parts"])
    if bounds:
        lines += ["", "Bounds", "-" * 6, "", *_grid(["bound of this addon", "measured", ""], bounds)]
    for part, tables in _tables(results):
        for title, headings, rows in tables:
            lines += ["", title, "-" * len(title), ""]
            lines += _grid(headings, rows) if rows else []
        if "failed" in part:
            lines += ["", "This part failed: ``%s``." % part["failed"].replace("`", "'")]
        lines += ["", *textwrap.wrap("*How:* " + _escaped(part["how"]), 118, break_on_hyphens=False)]
        lines += ["", "*Taken at %s, in %d s.*" % (part["at"], part["seconds"])]
    TABLES.write_text("\n".join(lines) + "\n")


def text(results):
    """Return the tables for a terminal."""
    lines = ["%-24s%s" % item for item in results["versions"].items()]
    for part, tables in _tables(results):
        for title, headings, rows in tables:
            lines += ["", title]
            if not rows:
                continue
            table = [headings, *rows]
            widths = [max(len(row[column]) for row in table) for column in range(len(headings))]
            table.insert(1, ["-" * width for width in widths])
            lines += ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
        if "failed" in part:
            lines.append("  FAILED: " + part["failed"])
    lines += ["", *("%-8s%s: %s" % (verdict, bound, found) for bound, found, verdict in _bounds(results["parts"]))]
    return "\n".join(lines)


def _bounds(parts):
    """Return rows: what this addon is to keep to, what was measured, and whether it did."""
    found = []
    for variant, figures in parts.get("latency", {}).get("figures", {}).items():
        bound = 1.05 if variant.endswith("prefork") else 1.2
        # What PgBouncer adds to Odoo's own queries is in the first, but not in the second.
        for key, where in (("e", variant), ("e-direct", variant + " without pooler")):
            ratio = (figures.get(key, {}).get("ratio_after") or {}).get("ratio")
            if ratio is None:
                continue
            found.append(
                ("p50 of a push to that of (a), %s, at most %.2f" % (where, bound), "%.2f" % ratio, ratio <= bound)
            )
    for variant, figures in parts.get("sharing", {}).get("figures", {}).items():
        # Up to the return of COMMIT it is the sender that has less to do.
        ratio = figures["guest"]["ratio_before"]["ratio"]
        what = "p50 of a push to a guest, COMMIT included, to that with its own connection, %s, at most 1.05" % variant
        found.append((what, "%.2f" % ratio, ratio <= 1.05))
    eight = parts.get("connections", {}).get("figures", {}).get("e", {}).get("8 instances")
    if eight:
        shown = "%d, %d direct" % (eight["connections"], eight["direct"])
        met = eight["connections"] <= 21 and eight["direct"] == 1
        found.append(("server connections of 8 instances, at most 21, of them 1 direct", shown, met))
    eight = parts.get("flood", {}).get("figures", {}).get("8 instances", {}).get("e")
    if eight:
        for what, ratio, least in (("(a)", eight["ratio"], 4), ("one bare listener", eight["ratio_to_floor"], 0.8)):
            text = "NOTIFYs/s with 8 instances to that with %s, at least %g" % (what, least)
            found.append((text, "%.2f" % ratio["median"], ratio["median"] >= least))
    checks = parts.get("cost", {}).get("figures", {}).get("self-check", {}).get("100")
    if checks and checks["notifies_per_hour"]:
        hour = checks["notifies_per_hour"]
        found.append(("NOTIFYs an hour of the self-check of 100 listeners, at most 200", str(hour), hour <= 200))
    for series, figures in parts.get("outage", {}).get("figures", {}).items():
        for fault, one in figures.get("e", {}).items():
            if fault == "timeline" or "failed" in one:
                continue
            what = "Odoo %s, after %s: " % (series, fault)
            if fault == "kill":
                seconds = one["seconds"]["median"]
                found.append((what + "median s to the first push, below 0.1", "%.3f" % seconds, seconds < 0.1))
            alone = one["lone"].get("arrived by itself", 0)
            lost = one["lost"] + sum(one["lone"].values()) - alone
            found.append((what + "none lost", "%d lost" % lost, not lost))
    return [(bound, measured, "met" if met else "MISSED") for bound, measured, met in found]


def _grid(headings, rows):
    """Return a simple table of reStructuredText."""
    rows = [[_escaped(cell) or "\\ " for cell in row] for row in [headings, *rows]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(headings))]
    line = "  ".join("=" * width for width in widths)
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return [line, shown[0], line, *shown[1:], line]


def _escaped(cell):
    return cell.replace("*", "\\*").replace("`", "\\`").replace("|", "\\|")


def _tables(results):
    """Yield each part and its tables: title, headings and rows; one that failed has at least a title."""
    for name, make in _TABLES.items():
        part = results["parts"].get(name)
        if part is None:
            continue
        made = [(title, headings, rows) for title, headings, rows in make(part["figures"]) if rows]
        yield part, made or [(name.capitalize(), [], [])]


def _contender(key):
    return "(%s) %s" % (key, NAMES[key]) if len(key) == 1 else NAMES[key]


def _in_order(figures):
    return [key for key in NAMES if key in figures]


def _number(value, form="%.3g"):
    return "-" if value is None else form % value


def _spread(found, form="%.3g"):
    """Return the median, with least and greatest if there are several."""
    if not found:
        return "-"
    if found["runs"] == 1:
        return form % found["median"]
    return "%s (%s to %s)" % tuple(form % found[key] for key in ("median", "min", "max"))


def _latency(figures):
    headings = ["", "n", "late", "p50 ms", "p95 ms", "p99 ms", "ratio to (a)", "p50 with NOTIFY", "ratio to (a)"]
    for variant, found in figures.items():
        rows = []
        for key in _in_order(found):
            one = found[key]
            if not one.get("after"):
                arrived = one.get("arrived", 0)
                rows.append([_contender(key), str(one["runs"]), "%d arrived" % arrived] + ["-"] * 6)
                continue
            after = ["%.2f" % one["after"][percent] for percent in ("p50", "p95", "p99")]
            rows.append(
                [_contender(key), str(one["runs"]), str(one["late"]), *after, _ratio(one["ratio_after"])]
                + ["%.2f" % one["before"]["p50"], _ratio(one["ratio_before"])]
            )
        yield "Push latency, Odoo " + variant, headings, rows


def _ratio(found):
    return "-" if not found else "%.2f (%.2f to %.2f)" % (found["ratio"], found["block_min"], found["block_max"])


def _sharing(figures):
    headings = ["", "n", "p50 ms", "p95 ms", "p99 ms", "ratio", "before: p50 ms", "ratio"]
    for variant, found in figures.items():
        rows = []
        for role, one in found.items():
            shares = role in ("host", "guest")
            after, before = [_ratio(one[name]) if shares else "-" for name in ("ratio_after", "ratio_before")]
            percents = ["%.2f" % one["after"][percent] for percent in ("p50", "p95", "p99")]
            rows.append([role, str(one["runs"]), *percents, after, "%.2f" % one["before"]["p50"], before])
        yield "Push through a host, Odoo " + variant, headings, rows


def _outage(figures):
    headings = ["", "fault", "n", "s to the first push", "lone message", "s", "lost", "sent"]
    for series, found in figures.items():
        rows = []
        for key in _in_order(found):
            for fault, one in found[key].items():
                if fault == "timeline":
                    continue
                if "failed" in one:
                    rows.append([_contender(key), fault, "-", "failed: " + one["failed"], "-", "-", "-", "-"])
                    continue
                fates = ", ".join("%s: %d" % fate for fate in one["lone"].items())
                seconds = [_spread(one["seconds"], "%.3f"), fates, _spread(one["lone_seconds"], "%.3f")]
                counts = [str(one["lost"]), str(one["sent"])]
                rows.append([_contender(key), fault, str(one["seconds"]["runs"]), *seconds, *counts])
        yield "Outage, Odoo " + series, headings, rows


def _connections(figures):
    headings = ["", "", "connections", "direct", "clients of PgBouncer", "requests/s", "errors", "timeouts"]
    rows = []
    for key in _in_order(figures):
        for what, one in figures[key].items():
            if what == "failed":
                rows.append([_contender(key), "failed: " + one] + ["-"] * 6)
                continue
            rows.append(
                [
                    _contender(key),
                    what.replace("1 instances", "1 instance"),
                    str(one["connections"]),
                    str(one["direct"]),
                ]
                + [_number(one["clients_of_pgbouncer"], "%d"), "%.0f" % one["requests_per_second"]]
                + [str(one["errors"]), str(one["timeouts"])]
            )
    yield "Server connections under load, Odoo 19.0", headings, rows


def _flood(figures):
    headings = ["instances", "", "NOTIFY/s", "ratio to (a)", "ratio to the floor", "after s", "direct"]
    rows = [
        [name.split()[0], _contender(key), _spread(one["notifies_per_second"], "%.0f")]
        + [_spread(one["ratio"], "%.2f"), _spread(one["ratio_to_floor"], "%.2f")]
        + [_spread(one["after_seconds"], "%.2f"), _number(one["direct"], "%d")]
        for name, found in figures.items()
        for key, one in ((key, found[key]) for key in _in_order(found))
    ]
    yield "NOTIFYs that a cluster takes beside instances of Odoo 19.0", headings, rows


def _listeners(figures):
    versions = figures.get("versions", {})
    found = {name: one for name, one in figures.items() if name != "versions"}
    measured = [name for name in versions if any(name in one for one in found.values())]
    headings = ["listeners", *("%s: %s" % (name, what) for name in measured for what in ("on imbus", "on another"))]
    rows = []
    for name, one in found.items():
        cells = [_spread(one[key][what], "%.0f") for key in measured for what in ("same_channel", "other_channel")]
        rows.append([name.split()[0], *cells])
    yield "NOTIFYs that a cluster takes beside bare listeners", headings, rows
    yield "Versions of PostgreSQL with bare listeners", ["", "version"], [list(one) for one in versions.items()]


def _burst(figures):
    headings = ["", "clients", "messages", "delivered/s", "sent/s", "lost", "doubled", "ratio to (a)"]
    rows = []
    for clients, found in figures.items():
        for key in _in_order(found):
            one = found[key]
            rows.append(
                [_contender(key), clients.split()[0], " + ".join(map(str, one["messages"]))]
                + [_spread(one["delivered_per_second"], "%.0f"), _spread(one["sent_per_second"], "%.0f")]
                + [str(one["lost"]), str(one["doubled"]), _spread(one["ratio"], "%.2f")]
            )
    yield "Burst, Odoo 19.0", headings, rows


def _cost(figures):
    idle, memory, start = (figures.get(key, {}) for key in ("idle", "memory", "start"))
    headings = ["", "CPU s per idle hour", "s to start", "RSS/USS MiB: main", "HTTP worker", "cron worker", "gevent"]
    rows = []
    for key in _in_order(idle):
        kinds = [memory.get(key, {}).get(kind) for kind in ("main", "http", "cron", "gevent")]
        shown = ["%.0f / %.0f" % (kind["rss"], kind["uss"]) if kind else "-" for kind in kinds]
        hour = "%.1f (in %d s)" % (idle[key]["cpu_seconds_per_hour"], idle[key]["seconds"])
        rows.append([_contender(key), hour, _spread(start.get(key), "%.2f"), *shown])
    yield "Cost, Odoo 19.0", headings, rows
    headings = ["listeners on the cluster", "clusters", "s", "first", "heartbeats", "s between two"]
    headings += ["NOTIFYs in the first hour", "CPU s of PostgreSQL per hour"]
    rows = [
        [count, *(str(one[what]) for what in ("clusters", "seconds", "first", "heartbeats"))]
        + [_number(one["interval"], "%.1f"), _number(one["notifies_per_hour"], "%d")]
        + ["%.1f" % one["server_cpu_seconds_per_hour"]]
        for count, one in figures.get("self-check", {}).items()
    ]
    yield "Cost of the self-check", headings, rows


def _scale(figures):
    headings = ["websockets", "", "connected", "one: p50 ms", "p95", "all: p50 ms", "p95", "all have it after s"]
    headings += ["missing", "catch-up s"]
    rows = []
    for name, found in figures.items():
        for key in _in_order(found):
            one, count = found[key], name.split()[0]
            if "failed" in one:
                rows.append([count, _contender(key), "failed: " + one["failed"]] + ["-"] * 7)
                continue
            shown = ["%.1f" % one[what][percent] if one[what] else "-" for what in ("one", "all") for percent in ("p50", "p95")]  # fmt: skip  # noqa: E501
            rows.append(
                [count, _contender(key), str(one["connected"]), *shown, _spread(one["all_last_seconds"], "%.2f")]
                + [str(one["missing"]), _spread(one.get("catch_up_seconds"), "%.2f")]
            )
    yield "Scale, Odoo 19.0 prefork", headings, rows


_TABLES = {
    "latency": _latency,
    "sharing": _sharing,
    "outage": _outage,
    "connections": _connections,
    "flood": _flood,
    "listeners": _listeners,
    "burst": _burst,
    "cost": _cost,
    "scale": _scale,
}
