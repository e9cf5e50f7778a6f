"""What was measured, and on what."""

import ast
import importlib.metadata
import os
import platform
import re
from pathlib import Path

import psutil

from stack.builds import find_build
from stack.commands import CommandError, run
from stack.postgres import full_version
from stack.servers import pgbouncer_program
from stack.stack import ADDON

from .contenders import oca_version

SERIES = ("19.0", "14.0")


def collect():
    """Return the versions of all that takes part, and what machine it is."""
    manifest = ast.literal_eval((ADDON / "bus_alt_connection" / "__manifest__.py").read_text())
    found = {
        "bus_alt_connection": "%s%s" % (manifest["version"], _commit()),
        "PostgreSQL": full_version(),
        "PgBouncer": run([pgbouncer_program(), "-V"]).split()[1],
        "tools": "Python %s, psycopg2 %s, websockets %s"
        % (
            platform.python_version(),
            importlib.metadata.version("psycopg2-binary"),
            importlib.metadata.version("websockets"),
        ),
        "machine": "%d CPUs (%s), %.0f GiB, Linux %s"
        % (os.cpu_count(), _cpu_model(), psutil.virtual_memory().total / 2**30, platform.release().split("-")[0]),
    }
    for series in SERIES:
        build = find_build(series)
        found["Odoo " + series] = "%s, Python %s, psycopg2 %s" % (build.description, build.python, build.psycopg2)
        found["OCA's addon for " + series] = oca_version(series)
    return found


def _commit():
    try:
        return ", commit " + run(["git", "-C", ADDON, "describe", "--always", "--dirty", "--abbrev=10"]).strip()
    except CommandError:
        return ""


def _cpu_model():
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1].strip() if found else platform.machine()
