# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""Wait for several connections at once, in one thread or greenlet.

A *task* is a generator. It yields a `Wait` whenever it has to wait. It is then sent True if the event has happened,
else False, at the deadline or earlier. Tasks call each other with ``yield from``.
"""

import collections
import contextlib
import selectors
import time

import psycopg2

# How often, in seconds, to check whether a wait has become pointless, see `connection.Connection.fault`.
_TICK = 0.5

#: What a task waits for: an event of `selectors` on a file descriptor, at most until ``deadline`` (monotonic seconds).
#: The descriptor is None if the task only wants to sleep.
Wait = collections.namedtuple("Wait", "descriptor event deadline")


def ready(waits, timeout):
    """Wait up to ``timeout`` seconds for any of ``waits``; return the set of the descriptors that are ready."""
    broken = set()
    if all(wait.descriptor is None for wait in waits):
        # Some systems can't select without a descriptor.
        time.sleep(timeout)
        return broken
    with selectors.DefaultSelector() as selector:
        for wait in waits:
            if wait.descriptor is not None:
                try:
                    selector.register(wait.descriptor, wait.event)
                except (OSError, ValueError, KeyError):
                    # libpq has closed the descriptor: the task finds out why.
                    broken.add(wait.descriptor)
        selected = selector.select(0 if broken else timeout)
    return broken.union(key.fd for key, _events in selected)


def finish(task):
    """Run ``task`` to its end and return its value. May block."""
    with contextlib.closing(task):
        try:
            wait = next(task)
            while True:
                seconds = min(wait.deadline - time.monotonic(), _TICK)
                wait = task.send(bool(ready([wait], max(seconds, 0))))
        except StopIteration as end:
            return end.value


def within(seconds, task, clock):
    """A task: run ``task``, and end it with ``psycopg2.OperationalError`` if it takes longer than ``seconds``.

    ``clock()``, such as `Tasks.attended`, returns the time in seconds; the limit is measured with it.
    """
    deadline = clock() + seconds
    with contextlib.closing(task):
        try:
            wait = next(task)
            while True:
                is_ready = yield wait._replace(deadline=min(wait.deadline, time.monotonic() + deadline - clock()))
                if not is_ready and clock() >= deadline:
                    raise psycopg2.OperationalError("no answer in %g s" % seconds)
                wait = task.send(is_ready)
        except StopIteration as result:
            return result.value


def sleep(seconds):
    """A task: wait for ``seconds``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield Wait(None, None, deadline)


class Tasks(object):
    """Tasks that run side by side. To be used by one thread only."""

    def __init__(self):
        self._waits = {}
        #: total seconds in which the tasks were not run; monotonic time at which they were last run
        self._unattended, self._seen = 0.0, time.monotonic()

    def __len__(self):
        return len(self._waits)

    def attended(self):
        """Return the seconds of a clock that stands still while this thread does something else.

        With these, a task measures how long an answer took. Another clock would count delays of this thread as well.
        """
        return self._seen - self._unattended

    def start(self, task):
        """Run ``task`` until it has to wait for the first time."""
        self._note_absence()
        self._resume(task, None)

    def run(self, until, waker=None):
        """Run all tasks until one has ended, ``waker`` is readable, or ``until`` (monotonic seconds) is reached.

        Raises what a task raises, which ends that task only. Raises ``OSError`` if the process
        has run out of descriptors; then all tasks are closed, to release theirs.
        """
        self._note_absence()
        number = len(self._waits)
        while self._waits and len(self._waits) == number:
            now = time.monotonic()
            waits = list(self._waits.values())
            first = min(wait.deadline for wait in waits)
            if waker is not None:
                waits.append(Wait(waker.fileno(), selectors.EVENT_READ, until))
            try:
                happened = ready(waits, max(min(first, until) - now, 0))
            except OSError:
                self.close()
                raise
            self._seen = now = time.monotonic()
            for task, wait in list(self._waits.items()):
                is_ready = wait.descriptor in happened
                if is_ready or now >= wait.deadline:
                    self._resume(task, is_ready)
            if now >= until or (waker is not None and waker.fileno() in happened):
                return

    def close(self):
        """End all tasks where they are; each closes its connection."""
        tasks, self._waits = list(self._waits), {}
        for task in tasks:
            task.close()

    def _note_absence(self):
        now = time.monotonic()
        self._unattended += now - self._seen
        self._seen = now

    def _resume(self, task, is_ready):
        self._waits.pop(task, None)
        # The first value that a generator receives must be None.
        with contextlib.suppress(StopIteration):
            self._waits[task] = task.send(is_ready)
