# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""Start the addon's threads so that they take little address space.

Odoo's ``limit_memory_soft`` counts address space, and a worker that exceeds it exits instead of
running its next job. A thread takes 72 MB by default: 8 MB for its stack, and 64 MB for an arena,
from which glibc's ``malloc`` serves this thread alone.
"""

import os
import sys
import threading

# Bytes. The JSON parser of Python 3.13 needs almost 1 MB for a payload of nothing but opening brackets, which anybody
# who may connect to the database can send.
STACK_SIZE = 2 << 20
# The option's number in glibc's malloc.h.
_M_ARENA_MAX = -8

#: pid -> lock; a forked child may have a copy of a lock that another thread of its parent held
_locks = {}


def start(target, name):
    """Run ``target()`` in a daemon thread, or in a greenlet if gevent has patched threads; return the thread.

    Raises ``RuntimeError`` if no thread can be started. Any thread may call this function.
    """
    thread = threading.Thread(target=target, name=name, daemon=True)
    if _are_greenlets():
        # A greenlet needs no thread stack. Besides, gevent's stack_size() never lowers the size, so the previous one
        # could not be restored.
        thread.start()
        return thread
    with _locks.setdefault(os.getpid(), threading.Lock()):
        # The size applies to all threads that the process starts meanwhile.
        previous = threading.stack_size()
        try:
            threading.stack_size(STACK_SIZE)
        except ValueError:
            # The system does not accept this size, so the thread gets the default.
            pass
        try:
            thread.start()
        finally:
            threading.stack_size(previous)
    return thread


def limit_arenas():
    """Make all threads of this process that start from now on share one arena of glibc's ``malloc``.

    Use this in a process in which two threads rarely work at the same time. Does nothing where
    ``malloc`` has no such option.
    """
    try:
        # Imported here, since some builds of Python lack it.
        import ctypes

        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
    except (ImportError, AttributeError, OSError, TypeError):
        # Another libc, or Windows.
        pass


def _are_greenlets():
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and monkey.is_module_patched("threading")
