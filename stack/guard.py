"""Nothing that we started outlives us.

One helper process holds the reading end of a pipe. When this interpreter is gone, in whatever way (``kill -9``
included), the pipe ends, and the helper kills the process groups and removes the folders that are still on its list.

PR_SET_PDEATHSIG would not do: it fires when the *thread* that started a process ends, and does not reach grandchildren.
"""

import atexit
import subprocess
import sys
import threading

_HELPER = """
import os, shutil, signal, sys, time
left = set()
for line in sys.stdin:
    sign, what = line[0], line[1:].rstrip("\\n")
    (left.add if sign == "+" else left.discard)(what)
for what in left:
    if what.isdigit():
        try:
            os.killpg(int(what), signal.SIGKILL)
        except OSError:
            pass
for what in left:
    if not what.isdigit():
        for _ in range(50):  # a dying server may still write into its folder
            shutil.rmtree(what, ignore_errors=True)
            if not os.path.exists(what):
                break
            time.sleep(0.1)
"""
_helper = None
_lock = threading.Lock()


def watch(what):
    """End ``what`` after us: a process group (its number) or a folder (its absolute path)."""
    _tell("+", what)


def forget(what):
    """Take back :func:`watch`."""
    _tell("-", what)


def _tell(sign, what):
    global _helper
    with _lock:
        if _helper is None:
            _helper = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _HELPER],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in the terminal must not reach it
                text=True,
            )
            atexit.register(_clean_up)
        _helper.stdin.write("%s%s\n" % (sign, what))
        _helper.stdin.flush()


def _clean_up():
    with _helper:  # ends the pipe and waits
        pass
