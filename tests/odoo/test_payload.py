"""Whatever anybody sends on imbus, Odoo's bus goes on."""

import random
import re

import pytest

from tests.support.addonlog import troubles, wait_for_record, wait_until_confirmed
from tests.support.payloads import HOSTILE


def _random_payloads(count):
    """Yield payloads that are put together from pieces of JSON, always the same."""
    generator = random.Random(count)
    pieces = '[ [[ ] ]] { } : , " "a" "\\u0000" "\\ud800" 1 1e999 NaN null'.split()
    for _ in range(count):
        yield "[%s]" % "".join(generator.choices(pieces, k=generator.randrange(12)))


@pytest.mark.matrix
def test_whatever_is_sent_on_imbus_the_bus_goes_on(stack):
    client = stack.client(["payload"])
    wait_until_confirmed(stack)
    begin = stack.odoo.log_mark()
    sender = stack.sender(direct=True)
    # The first is the one that the log shows.
    sender.notify("\x1b[31mé\nfaked line\u202e" + "y" * 5000)
    for payload in HOSTILE.values():
        sender.notify(payload)
    stack.send("payload", "after the garbage")
    client.wait_for("after the garbage")
    for payload in _random_payloads(3000):
        sender.notify(payload)
    client.subscribe(["payload"], stack.last_id())
    stack.send("payload", "after much garbage")
    client.wait_for("after much garbage")
    sender.close()

    wait_for_record(stack, "dropped a notification", begin)
    log = stack.odoo.log_since(begin)
    assert not re.search("Traceback|ERROR|CRITICAL", log), log
    ((_pid, level, message),) = troubles(stack, begin)
    assert level == "WARNING"
    assert re.match(r"dropped a notification .*, sent by backend pid \d+ on channel imbus: ", message)
    assert re.search(r": '\\x1b\[31m\\xe9\\nfaked line\\u202ey+'$", message)
    assert len(message) < 300
