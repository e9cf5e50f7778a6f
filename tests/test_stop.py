"""Odoo ends as it does without the addon: as fast, as quietly, with the same exit code."""

import re
import time
from typing import NamedTuple

from tests.stack.stack import ADDON, Stack

# Seconds, for a busy machine.
TOLERANCE = 3


class End(NamedTuple):
    seconds: float
    jitter: float  # by which these differ anyway
    code: int
    complaints: list  # lines of the log


def test_sigterm_ends_odoo_as_fast_as_without_the_addon(variant):
    # Without a pooler, since it must be one that listens in vain for nothing.
    without = _end(variant, addon=None, pooler=False)
    with_addon = _end(variant)
    assert without.code == with_addon.code == 0
    assert without.complaints == with_addon.complaints == []
    assert with_addon.seconds < without.seconds + TOLERANCE + with_addon.jitter


def test_sigterm_ends_odoo_while_its_listener_tries_to_connect(variant):
    def lose_server(stack):
        mark = stack.odoo.log_mark()
        stack.server.stop("immediate")
        stack.odoo.wait_for_log("lost the listener of database postgres", mark)

    end = _end(variant, before=lose_server)
    assert end.code == 0
    assert end.complaints == []
    assert end.seconds < 2 * TOLERANCE + end.jitter


def _end(variant, before=None, **arguments):
    """Have an Odoo end that somebody listens to, and return how it did."""
    with Stack(*variant, **{"addon": ADDON, **arguments}) as stack:
        client = stack.client()
        if variant == ("14.0", 0):
            _end_long_poll(stack, client)
        if before:
            before(stack)
        mark = stack.odoo.log_mark()
        began = time.monotonic()
        code = stack.odoo.stop(deadline=30)
        seconds = time.monotonic() - began
        complaints = re.findall(r".* (?:ERROR|CRITICAL) .*|.*Traceback.*", stack.odoo.log_since(mark))
        return End(seconds, stack.odoo.stop_jitter, code, complaints)


def _end_long_poll(stack, client):
    """Have the server answer a waiting poll, which else would hold up the end of a threaded Odoo, see there."""
    client.close()
    mark = stack.odoo.log_mark()
    stack.send("tests", "the last")
    stack.odoo.wait_for_log("POST /longpolling/poll", mark)
