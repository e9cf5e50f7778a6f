"""``make mutants``: plant each fault of ``faults.ini`` in a copy of the addon, and see whether the tests find it.

The unit tests come first, and then, if they find nothing, the simulation. Both stop at the first failure. Exits with 1
if a fault that is not harmless was not found.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import ROOT, listed, planted

# Seconds after which a fault counts as found: some make the tests hang.
_LONGEST = 1200
_NOT_COPIED = shutil.ignore_patterns(".git", ".stack", "__pycache__", "*_cache", "dist", "static")
# Tests with random examples have the same ones each time, and as much time as they need.
_ENVIRON = dict(os.environ, CI="1")
_NOBODY, _HANG = "nobody", "does not end"


def main():
    options = _arguments()
    faults = [fault for fault in listed() if not options.names or fault.name in options.names]
    print("%-48s %-11s %5s  %s" % ("planted fault", "module", "s", "found by"), flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        found = [fault for fault, by in zip(faults, pool.map(lambda one: _try(one, options), faults)) if by != _NOBODY]
    missed = [fault.name for fault in faults if fault not in found and not fault.harmless]
    harmless = sum(1 for fault in faults if fault.harmless)
    print("%d planted faults, %d found, %d harmless" % (len(faults), len(found), harmless))
    if missed:
        print("not found: " + ", ".join(missed))
    return bool(missed)


def _arguments():
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", help="plant these faults alone")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    parser.add_argument("--seeds", default="1-90", help="of the simulation")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - {fault.name for fault in listed()})
    if unknown:
        parser.error("no fault is called " + ", ".join(unknown))
    return options


def _try(fault, options):
    """Plant ``fault``, print what found it, and return that."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        shutil.copytree(ROOT, copy, ignore=_NOT_COPIED)
        path, text = planted(fault, copy)
        path.write_text(text, encoding="utf-8")
        by = _unit_test(copy, fault.module) or _simulation(copy, options.seeds) or _NOBODY
    print("%-48s %-11s %5.0f  %s" % (fault.name, fault.module, time.monotonic() - began, by), flush=True)
    return by


def _unit_test(copy, module):
    """Return which unit test of ``copy`` fails first; None if all pass."""
    # That the change can be made was found out already.
    files = [path for path in copy.glob("tests/unit/test_*.py") if path.stem != "test_mutants"]
    # What is about the module itself is likely to find the fault, so it comes first.
    files.sort(key=lambda path: (not path.stem.startswith("test_" + module), path))
    # What is late once, on a busy machine, proves nothing: it has a second try.
    options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-n", "0", "--timeout=60", "--reruns=1"]
    output = _output([sys.executable, "-m", "pytest", *options, *map(str, files)], copy)
    failed = re.search(r"^(?:FAILED|ERROR) tests/unit/(.*?)(?: - .*)?$", output or "", re.MULTILINE)
    return failed[1] if failed else _hang(output)


def _simulation(copy, seeds):
    """Return which story, or which seed and invariant, fails first; None if nothing does."""
    command = [sys.executable, "-m", "tests.simulation", "--addon", str(copy), "--seeds", seeds]
    output = _output([*command, "--stop", "--minutes", "20"], ROOT)
    failed = re.search(r"^seed (\d+) .*? at [\d.]+: ([^:]*)|^FAIL +(\w+)", output or "", re.MULTILINE)
    if failed:
        return "seed %s: %s" % failed.groups()[:2] if failed.group(1) else "story " + failed.group(3)
    return _hang(output)


def _output(command, folder):
    """Return what a program that fails has printed, None if it succeeds."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=_ENVIRON,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_LONGEST,
            text=True,
        )
    except subprocess.TimeoutExpired:
        return _HANG
    return done.stdout + "\nexit code %d" % done.returncode if done.returncode else None


def _hang(output):
    """Return that a program did not end, if so; raise ``RuntimeError`` if it failed for another reason than a test."""
    if output not in (None, _HANG):
        raise RuntimeError(output[-3000:])
    return output


sys.exit(main())
