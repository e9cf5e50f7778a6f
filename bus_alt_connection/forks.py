# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""Close in a forked child what only its parent may use.

A child that does not exec has copies of all descriptors. It would keep the name of a leader's socket bound and a server
connection open after its parent was killed. Before Python 3.7 there is no hook that could close them.
"""

import contextlib
import os
import weakref

import psycopg2

_of_parent = weakref.WeakSet()


def close_in_children(resource):
    """In every child forked from now on, close what ``resource.fileno()`` refers to, with Python 3.7 or newer."""
    _of_parent.add(resource)


def _close_all():
    nothing = os.open(os.devnull, os.O_RDWR)
    for resource in list(_of_parent):
        # Closing the resource itself could send something to the other end, which only the parent may do.
        with contextlib.suppress(OSError, ValueError, psycopg2.Error):
            os.dup2(nothing, resource.fileno(), False)
    os.close(nothing)


# Python before 3.7 does not have this function.
_register_at_fork = getattr(os, "register_at_fork", None)
if _register_at_fork is not None:
    _register_at_fork(after_in_child=_close_all)
