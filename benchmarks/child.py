"""Processes beside the one that measures; each ends when its standard input does."""

import contextlib
import subprocess
import sys

from stack import guard
from stack.stack import ADDON


def start(module, *arguments):
    """Return the ``Popen`` of a module of this package, with pipes for text to and from it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks." + module, *map(str, arguments)],
        cwd=ADDON,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    guard.watch(process.pid)
    return process


def end(process):
    with contextlib.suppress(OSError):
        process.stdin.close()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()
    guard.forget(process.pid)
