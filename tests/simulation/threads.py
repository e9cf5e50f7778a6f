"""Locks, conditions and threads of the simulated processes.

They check the order of locks that the docstring of ``listener.py`` promises.
"""

import sys

from . import kernel
from .kernel import Task, point

# The rank of a lock, by the module that makes it. A thread that holds a lock waits only for those of a higher rank. The
# lock of a log handler is made by `odoo`.
_RANKS = {"patch": 1, "odoo": 2, "threads": 3, "catchup": 3, "sharing": 3, "waker": 3, "listener": 4}


class Lock:
    """``threading.Lock``. Who looks on from outside of all tasks gets it at once, and changes nothing."""

    _reentrant = False

    def __init__(self):
        self._owner, self._count, self._waiters = None, 0, []
        maker = sys._getframe(1)
        while maker.f_globals["__name__"] == __name__:
            maker = maker.f_back
        self.module = maker.f_globals["__name__"].rpartition(".")[2]

    def acquire(self, blocking=True):
        point()
        me = kernel.K.current
        if me is None:
            return True
        if blocking:
            _check_order(me, self)
        while self._count and not (self._reentrant and self._owner is me):
            if not blocking:
                return False
            kernel.K.wait([self._waiters])
        self._owner = me
        self._count += 1
        me.locks.append(self)
        return True

    def release(self):
        if kernel.K.current is None or kernel.K.current.process.dead:
            return
        if not self._count:
            raise RuntimeError("release unlocked lock")
        self._count -= 1
        self._owner.locks.remove(self)
        if not self._count:
            self._owner = None
            kernel.K.wake(self._waiters)

    def __enter__(self):
        return self.acquire()

    def __exit__(self, *_error):
        self.release()


def _check_order(task, wanted):
    for held in task.locks:
        if held is not wanted and _RANKS[held.module] >= _RANKS[wanted.module]:
            text = "%s holds a lock of %s and waits for one of %s" % (task.name, held.module, wanted.module)
            kernel.K.problem("order of locks", text)


class Condition(Lock):
    """``threading.Condition`` with a lock of its own, which is reentrant."""

    _reentrant = True

    def __init__(self):
        super().__init__()
        self._sleepers = []

    def wait_for(self, predicate, timeout=None):
        deadline = None if timeout is None else kernel.K.now + timeout
        result = predicate()
        while not result and (deadline is None or kernel.K.now < deadline):
            self._sleep(deadline)
            result = predicate()
        return result

    def notify_all(self):
        me = kernel.K.current
        if me is not None and self._owner is not me and not me.process.dead:
            raise RuntimeError("cannot notify on un-acquired lock")
        kernel.K.wake(self._sleepers)

    def _sleep(self, deadline):
        """Release the lock until somebody notifies, or until ``deadline``."""
        if set(kernel.K.current.locks) != {self}:
            kernel.K.problem("order of locks", "a thread waits for an event while it holds another lock")
        count, self._count, self._owner = self._count, 0, None
        kernel.K.wake(self._waiters)
        kernel.K.wait([self._sleepers], deadline)
        while self._count:
            kernel.K.wait([self._waiters])
        self._count, self._owner = count, kernel.K.current


class Thread:
    def __init__(self, target, name, daemon):
        self._target, self._name = target, name

    def start(self):
        process = kernel.K.current.process
        if process.no_threads:
            raise RuntimeError("can't start new thread")
        # In the trace, a thread has the last part of its name.
        name = self._name.replace("bus_alt_connection.", "").replace(".postgres", "")
        Task(process, self._target, (), "%s/%s" % (process.name, name))
        if process.preempts and kernel.K.head_start:
            kernel.K.yield_(kernel.K.head_start)
        point()
