"""An outage of the direct way, in stacks with a proxy on it."""

import contextlib

from tests.support.addonlog import wait_for_record

#: pattern of how the line of the log begins that says so
LOST = r"lost the listener of database postgres: "


@contextlib.contextmanager
def direct_way_closed(stack):
    """Lose the direct connections, and let none be made during the block."""
    mark = stack.odoo.log_mark()
    stack.proxy.refuse()
    stack.proxy.cut()
    wait_for_record(stack, LOST, mark)
    try:
        yield
    finally:
        stack.proxy.forward()
