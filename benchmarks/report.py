"""From ``results.json`` to the tables in ``results.rst``."""

import inspect
import json
import re
import textwrap
from pathlib import Path

from tabulate import tabulate

from . import connections, flood, latency, listeners, outage
from .contenders import name

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results.json"
TABLES = FOLDER / "results.rst"

#: name -> function that measures it. ``function(quick, tell)`` yields pairs: the title of a table and a row of it, a
#: dictionary. The results quote the docstring of the function.
PARTS = {
    "latency": latency.run,
    "sharing": latency.run_sharing,
    "outage": outage.run,
    "connections": connections.run,
    "flood": flood.run,
    "listeners": listeners.run,
}


def load(quick):
    """Return the results of the last run, to which this one adds; empty ones if that run was of the other kind."""
    if RESULTS.exists():
        results = json.loads(RESULTS.read_text())
        if results["quick"] == quick:
            return results
    return {"quick": quick, "versions": {}, "parts": {}}


def save(results):
    text = json.dumps(results, indent=1, ensure_ascii=False)
    # A list of numbers takes one line.
    RESULTS.write_text(re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), text) + "\n")


def write_tables(results):
    """Write ``results.rst``; return its text."""
    lines = [".. Written by make bench. Do not edit.", "", "=======", "Results", "=======", ""]
    if results["quick"]:
        lines += ["**These are of a quick run, with few samples: they only show that it works.**", ""]
    lines += _table([{"": name, "version": version} for name, version in results["versions"].items()])
    for part_name in filter(results["parts"].get, PARTS):
        part = results["parts"][part_name]
        for title, rows in part["tables"].items():
            lines += ["", title, "-" * len(title), "", *_table(rows)]
        how = " ".join(inspect.getdoc(PARTS[part_name]).split())
        lines += ["", *textwrap.wrap("*How:* " + _escaped(how), 118, break_on_hyphens=False)]
        lines += ["", "*Taken at %s, in %d s.*" % (part["at"], part["seconds"])]
    text = "\n".join(lines) + "\n"
    TABLES.write_text(text)
    return text


def _table(rows):
    """Return the lines of a simple table of reStructuredText."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[_escaped(_cell(column, row.get(column))) for column in columns] for row in rows]
    headings = ["\\ " if column == "contender" else column or "\\ " for column in columns]
    table = tabulate(cells, headings, tablefmt="rst", disable_numparse=True)
    return [line.rstrip() for line in table.splitlines()]


def _cell(column, value):
    if value is None:
        return "-"
    if isinstance(value, list):
        return "%g (%g to %g)" % tuple(value)
    if column == "contender":
        return name(value)
    return value if isinstance(value, str) else "%g" % value


def _escaped(text):
    return re.sub(r"[*`|]", r"\\\g<0>", text)
