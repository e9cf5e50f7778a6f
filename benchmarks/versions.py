"""What was measured, and on what."""

import ast
import os
import platform
import re
from pathlib import Path

import psutil

from stack.builds import find_build, python_versions
from stack.commands import run
from stack.pgbouncer import PgBouncer
from stack.postgres import full_version
from stack.stack import ADDON

from .contenders import SERIES, oca_version


def collect():
    """Return the versions of all that takes part, and what machine it is."""
    commit = run(["git", "-C", ADDON, "describe", "--always", "--dirty", "--abbrev=10"]).strip()
    manifest = ast.literal_eval((ADDON / "bus_alt_connection" / "__manifest__.py").read_text())
    build = find_build(SERIES)
    python, psycopg2, _libpq = python_versions(build)
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    gibibytes = psutil.virtual_memory().total / 2**30
    return {
        "bus_alt_connection": "%s, commit %s" % (manifest["version"], commit),
        "PostgreSQL": full_version(),
        "PgBouncer": run([PgBouncer.program(), "-V"]).split()[1],
        "Odoo": "%s, Python %s, psycopg2 %s" % (build.version, python, psycopg2),
        "OCA's addon": oca_version(),
        "machine": "%d CPUs (%s), %.0f GiB, Linux %s"
        % (os.cpu_count(), model[1].strip() if model else "?", gibibytes, platform.release().split("-")[0]),
    }
