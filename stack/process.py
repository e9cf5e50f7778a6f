"""Base of the servers: a process with a folder, a log, and an end."""

import contextlib
import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import psutil

from . import ports
from .waiting import wait_until


def identity(user):
    """Return the arguments that make :mod:`subprocess` run a program as ``user`` (None: as ourselves)."""
    if user is None:
        return {}
    entry = pwd.getpwnam(user)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def server_user():
    """Return the user for servers that refuse to run as root: ``postgres`` if we are root, else None (ourselves)."""
    return "postgres" if os.geteuid() == 0 else None


# Waits for the end of its input. A dying server may still write into its folder.
_GUARD = 'read _; kill -s KILL -- "-$1"; for _ in 1 2 3 4 5; do rm -rf "$2" && break; sleep 1; done'


def _end_after_us(group, folder):
    """Have a process group and a folder removed when this interpreter is gone, in whatever way, ``kill -9`` included.

    Only we have the other end of the pipe. PR_SET_PDEATHSIG would not do: it fires when the *thread* that started a
    process ends, and does not reach grandchildren.

    :return: the process that does so, to be killed where it is not needed any more
    """
    # It has a session of its own, so that Ctrl-C in the terminal does not reach it.
    command = ["sh", "-c", _GUARD, "sh", str(group), folder]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, stdin=subprocess.PIPE, **quiet, start_new_session=True)


class Process:
    """A server process of its own group, with a temporary folder that goes with it.

    Subclasses have the methods ``prepare``, which writes what the server reads when it starts, ``command``, which
    returns what to run, and ``is_up``.
    As a context manager it is started on entry, and ended and cleaned away on exit.
    """

    name = "process"
    start_deadline = 30.0
    stop_deadline = 10.0
    stop_signal = signal.SIGTERM

    def __init__(self, run_as=None):
        self.run_as = run_as
        self.folder = Path(tempfile.mkdtemp(prefix="bus_alt_connection-%s-" % self.name))
        if run_as:
            shutil.chown(self.folder, run_as)
        self.log_path = self.folder / "log"
        self.log_path.touch()
        self._ports = []
        self._process = self._guard = None

    def environment(self):
        return dict(os.environ)

    def take_port(self):
        """Return a free port, which it has until :meth:`close`."""
        self._ports.append(ports.take_port())
        return self._ports[-1]

    # Life

    @property
    def pid(self):
        """Process id, None while it does not run."""
        return self._process.pid if self.running else None

    @property
    def running(self):
        return self._process is not None and self._process.poll() is None

    def start(self):
        """Start and return self once the server answers.

        :raise RuntimeError: it ended instead; the message has the end of its log
        :raise TimeoutError: it does not answer within ``start_deadline``
        """
        self._launch()
        try:
            wait_until(self._is_up_or_dead, self.start_deadline, "%s to answer" % self.name, 0.05, self.log_tail)
        except BaseException:
            self.kill()
            raise
        return self

    def run(self, deadline):
        """Start it and wait until it ends by itself.

        :raise RuntimeError: it failed, or did not end within ``deadline`` seconds; the message has the end of its log
        """
        self._launch()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(deadline)
        finally:
            code = self._end(self._family())
        if code:
            raise RuntimeError("%s ended with code %s\n%s" % (self.name, code, self.log_tail()))

    def _launch(self):
        if self.running:
            raise RuntimeError("%s runs already" % self.name)
        self.prepare()
        with open(self.log_path, "ab") as log:
            self._process = subprocess.Popen(
                [str(part) for part in self.command()],
                env=self.environment(),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **identity(self.run_as),
            )
        self._guard = _end_after_us(self._process.pid, self.folder)

    def _is_up_or_dead(self):
        if not self.running:
            code = self._process.returncode
            raise RuntimeError("%s ended with code %s\n%s" % (self.name, code, self.log_tail()))
        return self.is_up()

    def stop(self, deadline=None):
        """Ask the server to end, and kill what of it is left after ``deadline`` seconds.

        :return: exit code; negative: the signal that ended it, so -9 says that it did not end by itself; None if it
            was not started, or ended before
        """
        if self._process is None:
            return None
        family = self._family()
        if self.running:
            self._process.send_signal(self.stop_signal)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(self.stop_deadline if deadline is None else deadline)
        return self._end(family)

    def kill(self):
        """``kill -9`` for the server and all its children; returns when they are gone."""
        if self._process is not None:
            self._end(self._family())

    def restart(self):
        self.stop()
        return self.start()

    def close(self):
        """End the server at once, remove its folder. It can not be started again."""
        self.kill()  # there is nothing left for it to save
        shutil.rmtree(self.folder, ignore_errors=True)
        while self._ports:
            ports.release_port(self._ports.pop())

    def __enter__(self):
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *exception):
        self.close()

    def _family(self):
        # Also those that left the process group, as each backend of PostgreSQL does.
        try:
            return psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def _end(self, family):
        process, self._process = self._process, None
        if process.poll() is None:
            process.kill()
            process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        wait_until(lambda: not any(map(is_alive, family)), 10, "the children of %s to go" % self.name)
        with self._guard:
            self._guard.kill()
        return process.returncode

    # Log

    def log(self):
        """All that the server has written to its log."""
        return self.log_since(0)

    def log_mark(self):
        """A mark for :meth:`log_since`: here ends the log now."""
        return self.log_path.stat().st_size

    def log_since(self, mark):
        with open(self.log_path, "rb") as log:
            log.seek(mark)
            return log.read().decode("utf-8", "replace")

    def log_tail(self, lines=30):
        return "\n".join(self.log().splitlines()[-lines:])

    def wait_for_log(self, pattern, since=0, deadline=10.0):
        """Return the first match of the regular expression in the log after the mark ``since``.

        :raise TimeoutError: none within ``deadline`` seconds
        """
        regex = re.compile(pattern, re.MULTILINE)
        return wait_until(
            lambda: regex.search(self.log_since(since)),
            deadline,
            "%r in the log of %s" % (pattern, self.name),
            0.05,
            self.log_tail,
        )


def is_alive(process):
    """Return whether a :class:`psutil.Process` still runs."""
    # A zombie whose new parent (process 1 of a container, say) does not collect it is as dead as it will get.
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
