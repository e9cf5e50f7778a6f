"""Locks, conditions, events, queues and threads of the simulated processes."""

import collections
import queue as real_queue

from . import kernel
from .kernel import Task, point


class Lock:
    """``threading.Lock``. Who looks on from outside of all tasks gets it at once, and changes nothing."""

    _reentrant = False

    def __init__(self):
        self._owner, self._count, self._waiters = None, 0, []

    def acquire(self, blocking=True, timeout=-1):
        point()
        me = kernel.K.current
        if me is None:
            return True
        deadline = kernel.K.now + timeout if timeout >= 0 else None
        while self._count and not (self._reentrant and self._owner is me):
            if not blocking or deadline is not None and kernel.K.now >= deadline:
                return False
            kernel.K.wait([self._waiters], deadline)
        self._owner = me
        self._count += 1
        return True

    def release(self):
        if kernel.K.current is None or kernel.K.current.process.dead:
            return
        if not self._count:
            raise RuntimeError("release unlocked lock")
        self._count -= 1
        if not self._count:
            self._owner = None
            kernel.K.wake(self._waiters)

    def locked(self):
        return bool(self._count)

    def __enter__(self):
        return self.acquire()

    def __exit__(self, *_error):
        self.release()


class RLock(Lock):
    _reentrant = True


class Condition(RLock):
    """``threading.Condition`` with a lock of its own, or with that of ``lock``."""

    def __init__(self, lock=None):
        super().__init__()
        if lock is not None:
            raise NotImplementedError("the simulation has no Condition with a lock of somebody else")
        self._sleepers = []

    def wait(self, timeout=None):
        count, self._count, self._owner = self._count, 0, None
        kernel.K.wake(self._waiters)
        mine = []
        self._sleepers.append(mine)
        deadline = None if timeout is None else kernel.K.now + max(timeout, 0)
        kernel.K.wait([mine], deadline)
        notified = mine not in self._sleepers
        if not notified:
            self._sleepers.remove(mine)
        while self._count:
            kernel.K.wait([self._waiters])
        self._count, self._owner = count, kernel.K.current
        return notified

    def wait_for(self, predicate, timeout=None):
        end = None if timeout is None else kernel.K.now + timeout
        result = predicate()
        while not result:
            left = None if end is None else end - kernel.K.now
            if left is not None and left <= 0:
                break
            self.wait(left)
            result = predicate()
        return result

    def notify(self, number=1):
        me = kernel.K.current
        if me is not None and self._owner is not me and not me.process.dead:
            raise RuntimeError("cannot notify on un-acquired lock")
        for mine in self._sleepers[:number]:
            kernel.K.wake(mine)
        del self._sleepers[:number]

    def notify_all(self):
        self.notify(len(self._sleepers))


class Event:
    def __init__(self):
        self._flag, self._waiters = False, []

    def is_set(self):
        return self._flag

    def set(self):
        self._flag = True
        kernel.K.wake(self._waiters)

    def clear(self):
        self._flag = False

    def wait(self, timeout=None):
        point()
        deadline = None if timeout is None else kernel.K.now + max(timeout, 0)
        while not self._flag and (deadline is None or kernel.K.now < deadline):
            kernel.K.wait([self._waiters], deadline)
        return self._flag


class Thread:
    def __init__(self, group=None, target=None, name="", args=(), kwargs=None, daemon=None):
        self.name, self.daemon, self.ident = name, daemon, None
        self._target, self._args, self._kwargs = target, args, kwargs or {}
        self._task = None

    def run(self):
        if self._target:
            self._target(*self._args, **self._kwargs)

    def start(self):
        process = kernel.K.current.process
        if process.no_threads:
            raise RuntimeError("can't start new thread")
        self._task = Task(process, self.run, (), "%s/%s" % (process.name, short_name(self.name)))
        self.ident = self._task.serial
        if process.preempts and kernel.K.head_start:
            kernel.K.yield_(kernel.K.head_start)
        point()

    def is_alive(self):
        return self._task is not None and not self._task.over

    def join(self, timeout=None):
        deadline = None if timeout is None else kernel.K.now + timeout
        while self.is_alive() and (deadline is None or kernel.K.now < deadline):
            kernel.K.wait([self._task.joiners], deadline)


def short_name(name):
    """Return the last part of the name of one of the addon's threads, for the trace."""
    return name.replace("bus_alt_connection.", "").replace(".postgres", "")


class Local:
    """``threading.local``."""

    def __getattribute__(self, name):
        values = object.__getattribute__(self, "__dict__").setdefault(kernel.K.current, {})
        if name == "__dict__":
            return values
        try:
            return values[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name, value):
        object.__getattribute__(self, "__dict__").setdefault(kernel.K.current, {})[name] = value


class Queue:
    """``queue.Queue`` and ``queue.SimpleQueue``."""

    def __init__(self, maxsize=0):
        self._maxsize, self._items, self._waiters = maxsize, collections.deque(), []

    def qsize(self):
        return len(self._items)

    def empty(self):
        return not self._items

    def put(self, item, block=True, timeout=None):
        point()
        deadline = None if timeout is None else kernel.K.now + timeout
        while self._maxsize and len(self._items) >= self._maxsize:
            if not block or deadline is not None and kernel.K.now >= deadline:
                raise real_queue.Full
            kernel.K.wait([self._waiters], deadline)
        self._items.append(item)
        kernel.K.wake(self._waiters)

    def get(self, block=True, timeout=None):
        point()
        deadline = None if timeout is None else kernel.K.now + timeout
        while not self._items:
            if not block or deadline is not None and kernel.K.now >= deadline:
                raise real_queue.Empty
            kernel.K.wait([self._waiters], deadline)
        kernel.K.wake(self._waiters)
        return self._items.popleft()

    def put_nowait(self, item):
        self.put(item, block=False)

    def get_nowait(self):
        return self.get(block=False)
