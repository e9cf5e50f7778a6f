"""Processes beside the one that measures; each ends when its standard input does."""

import contextlib
import json
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


def ask(process, question):
    """Return what the process answers to ``question``; both are dictionaries, and it uses :func:`answer`.

    :raise RuntimeError: it has ended
    """
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(question) + "\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("the process %s has ended" % process.args[2])
    return json.loads(line)


def answer(what):
    """Answer, in the process that was asked."""
    print(json.dumps(what), flush=True)


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
