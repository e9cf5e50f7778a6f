"""Processes beside the one that measures; each ends when its standard input does."""

import contextlib
import json
import subprocess
import sys

from stack import guard
from stack.stack import ADDON


class Child:
    """A module of this package in a process of its own, with pipes for text to and from it."""

    def __init__(self, module, *arguments):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks." + module, *map(str, arguments)],
            cwd=ADDON,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
        self.pid = self._process.pid
        guard.watch(self.pid)

    def read(self):
        """Return the next line that it prints; an empty one if it has ended."""
        return self._process.stdout.readline()

    def ask(self, question):
        """Return what it answers to ``question``; both are dictionaries, and it uses :func:`answer`.

        :raise RuntimeError: it has ended
        """
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        line = self.read()
        if not line:
            raise RuntimeError("the process %s has ended" % self._process.args[2])
        return json.loads(line)

    def close(self):
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        guard.forget(self.pid)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def answer(what):
    """Answer, in the process that was asked."""
    print(json.dumps(what), flush=True)
