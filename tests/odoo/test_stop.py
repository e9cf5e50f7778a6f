"""Odoo ends as it does without the addon: as fast, as quietly, with the same exit code."""

import re
import time
from typing import NamedTuple

import pytest

from stack.odoo import series_number
from stack.stack import Stack

# Seconds, for a busy machine.
TOLERANCE = 3


class End(NamedTuple):
    seconds: float
    jitter: float  # by which these differ anyway, of stock Odoo too
    code: int
    complaints: list  # lines of the log
    log: str
    called: list  # names of the functions that were registered for the end
    expected: bool  # whether the bus registers one


@pytest.mark.matrix
@pytest.mark.rest
@pytest.mark.variants("14.0-prefork", "19.0-threaded", "19.0-prefork")
def test_sigterm_ends_odoo_as_it_does_without_the_addon(variant):
    # Without a pooler, since it must be one that listens in vain for nothing.
    without, with_addon = _end(variant, addon=None, pooler=False), _end(variant)
    assert without.code == with_addon.code == 0
    # Without it, a cron thread may complain that its connection was closed.
    assert with_addon.complaints == [], with_addon.log
    assert with_addon.seconds < without.seconds + TOLERANCE + with_addon.jitter
    # 15.0 registers nothing if the bus is imported before there is a server, as an addon may have it.
    assert with_addon.called == without.called
    assert not with_addon.expected or with_addon.called


@pytest.mark.matrix
def test_sigterm_ends_odoo_while_its_listener_tries_to_connect(variant):
    def lose_server(stack):
        mark = stack.odoo.log_mark()
        stack.proxy.refuse()
        stack.proxy.cut()
        # Some wait for the database when they end, without the addon as well: up to 14.0 cron workers for the answer of
        # the pooler, and from 16.0 on a threaded server for that to the question of a websocket (19.0 only if it is
        # busy).
        series = series_number(stack.series)
        if series >= 15 if stack.odoo.workers else series < 16:
            stack.server.kill()
        stack.odoo.wait_for_log("lost the listener of database postgres", mark)

    end = _end(variant, before=lose_server)
    assert end.code == 0
    assert end.complaints == [], end.log
    assert end.seconds < 2 * TOLERANCE + end.jitter


def _end(variant, before=None, **arguments):
    """Have an Odoo end that somebody listens to, and return how it did."""
    options = ["--log-handler=odoo.service.server:DEBUG"]
    with Stack(*variant, options=options, jobs=False, proxy=before is not None, **arguments) as stack:
        threaded, with_stop_hook = not stack.odoo.workers, stack.build.with_stop_hook
        client = stack.client()
        # Late 15.0 answers it, if the database is there.
        if threaded and series_number(stack.series) < 16 and (before or not with_stop_hook):
            _end_long_poll(stack, client)
        if before:
            before(stack)
        mark = stack.odoo.log_mark()
        began = time.monotonic()
        code = stack.odoo.stop(deadline=30)
        seconds = time.monotonic() - began
        log = stack.odoo.log_since(mark)
        complaints = r".* (?:ERROR|CRITICAL) .*|.*Traceback.*"
        if threaded and 15 <= series_number(stack.series) < 19:
            # These disturb their clients and close all connections at the same time, and requests that are at work
            # then complain. It is none of theirs if it comes from us, or from a thread that has our cursor.
            ours = r".* (?:ERROR|CRITICAL) \S+ odoo\.addons\.bus_alt_connection.*"
            complaints = ours + "|Exception in thread (?!.*http).*"
        return End(
            seconds,
            # About one worker in ten misses the signal, and takes note of it one beat of 4 s later.
            0 if threaded else 4,
            code,
            complaints=re.findall(complaints, log),
            log=log,
            called=sorted(re.findall(r"on_close call <bound method (\S+)", log)),
            expected=threaded and with_stop_hook,
        )


def _end_long_poll(stack, client):
    """Have the server answer a waiting poll, which else would hold up the end of a threaded Odoo, see there."""
    client.close()
    mark = stack.odoo.log_mark()
    stack.send("tests", "the last")
    stack.odoo.wait_for_log("POST /longpolling/poll", mark)
