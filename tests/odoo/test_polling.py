"""Nothing listens: the dispatcher is fed from bus_bus, and messages arrive late, but they arrive."""

import re

import pytest

from stack.stack import Stack
from stack.waiting import wait_until
from tests.support.addonlog import bus_pid, records, wait_for_record, wait_until_confirmed
from tests.support.flow import flowing
from tests.support.traffic import statements

#: seconds until what is looked for every second is there: generous, for a busy machine
SOON = 15
BEGINS = (
    "nothing listens on database postgres: looking into bus_bus every 1 s instead,"
    " so that notifications arrive late but arrive"
)
TAKEN_OVER = "the listener of database postgres has taken over from polling"


@pytest.fixture(scope="module")
def stack(variant):
    with Stack(*variant, environment={"IMDISPATCHER_POLL_INTERVAL": "1"}, jobs=False, proxy=True) as stack:
        yield stack


def ticks(stack, since):
    return [one for one in statements(stack, since) if re.search(r"txid_current_snapshot.*\bbus_bus\b", one.text)]


def wait_for_ticks(stack, count, since):
    wait_until(lambda: len(ticks(stack, since)) >= count, SOON, "%d looks" % count, 0.1, stack.odoo.log_tail)


def test_polling_begins_and_ends_with_a_line_in_the_log_each_and_nothing_is_lost_or_doubled(stack):
    with stack.client(["flow"]) as client:
        wait_until_confirmed(stack)
        with flowing(stack, client, "flow", 0.03, SOON):
            mark = stack.odoo.log_mark()
            stack.proxy.refuse()
            stack.proxy.cut()
            wait_for_record(stack, BEGINS, mark)
            wait_for_ticks(stack, 3, stack.server.log_mark())
            assert stack.odoo.health()["mode"] == "polling"
            stack.proxy.forward()
            wait_for_record(stack, TAKEN_OVER, mark)
            wait_until_confirmed(stack, mark)
    said = [(found.level, found.message) for found in records(stack, mark, bus_pid(stack))]
    expected = [
        ("WARNING", "lost the listener of database postgres: "),
        ("WARNING", BEGINS),
        # A line about the connection comes half a second later than it happened.
        ("INFO", TAKEN_OVER),
        ("INFO", "listening again on "),
    ]
    assert [(level, message[: len(text)]) for (level, message), (_, text) in zip(said, expected)] == expected
    assert len(said) == len(expected)
