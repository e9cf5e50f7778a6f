"""Whatever anybody sends on imbus, Odoo's bus goes on."""

import importlib.util
import random
import re
import sys

import pytest

from stack.builds import find_build
from tests.support.addonlog import troubles, wait_for_record, wait_until_confirmed
from tests.support.payloads import HOSTILE, READERS


def _orjson_of_odoo(without_package):
    """Return Odoo 19.0's own module, which falls back on json where orjson is not installed."""
    path = find_build("19.0").root / "odoo" / "addons" / "bus" / "tools" / "orjson.py"
    spec = importlib.util.spec_from_file_location("odoo_orjson", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        if without_package:
            patch.setitem(sys.modules, "orjson", None)
        spec.loader.exec_module(module)
    assert hasattr(module, "json") == without_package
    return module


def _outcome(loads, payload):
    """Return what comes of a payload, as text that can be compared: NaN is not equal to itself."""
    try:
        return repr(loads(payload))
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("without_package", [True, False])
def test_odoo_reads_payloads_with_what_other_tests_take_for_its_readers(without_package):
    own, reader = _orjson_of_odoo(without_package).loads, READERS[not without_package]
    for payload in [*HOSTILE.values(), '[["bus_alt", "res.partner", 3]]']:
        assert _outcome(own, payload) == _outcome(reader, payload)


def _random_payloads(count):
    """Yield payloads that are put together from pieces of JSON, always the same."""
    generator = random.Random(count)
    pieces = '[ [[ ] ]] { } : , " "a" "\\u0000" "\\ud800" 1 1e999 NaN null'.split()
    for _ in range(count):
        yield "[%s]" % "".join(generator.choices(pieces, k=generator.randrange(12)))


@pytest.mark.matrix
def test_garbage_does_not_stop_the_bus(stack):
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
