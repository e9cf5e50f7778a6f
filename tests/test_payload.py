"""Whatever anybody sends on imbus, Odoo's dispatcher gets only what it can read."""

import importlib.util
import json
import random
import re
import sys

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bus_alt_connection.listener import digestible
from stack.builds import find_build
from tests.support.addonlog import troubles, wait_until_confirmed

# PostgreSQL takes no more of a payload, in bytes.
_LONGEST = 7999

_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.integers(-(2**70), 2**70)
_json_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=30,
)
_channels = st.text(max_size=20) | st.lists(st.text(max_size=20) | st.integers(0, 10**9), max_size=4)
#: texts that look like payloads, more or less
_payloads = st.one_of(
    st.text(max_size=200),
    st.text(alphabet='[]{}",:\\u0019dD8eEtfn- \n\x00\ud800', max_size=60),
    st.builds(json.dumps, _json_values, ensure_ascii=st.booleans()),
    st.builds(json.dumps, st.lists(_json_values, max_size=4), ensure_ascii=st.booleans()),
    st.builds(json.dumps, st.lists(_channels, max_size=4), ensure_ascii=st.booleans()),
)

#: what each series makes of it; below 19.0 that is json
_HOSTILE = {
    "nothing": "",
    "no JSON": "garbage",
    "a BOM": "\ufeff[]",
    "a number": "1",
    "a string": '"tests"',
    "null": "null",
    "an object": '{"tests": 1}',
    "a list of numbers": "[1, 2]",
    "a list with null": "[null]",
    "an object as channel": '[{"tests": 1}]',
    "an unhashable channel": '[["tests", ["tests"]]]',
    "an object in a channel": '[["tests", {}]]',
    "NaN": "[NaN]",
    "NaN in a channel": '[["tests", NaN, Infinity]]',
    "a float that is none": '[["tests", 1e999]]',
    "a huge number": "[[%s]]" % ("9" * 7000),
    "a large number": "[[%d]]" % 2**70,
    "NUL, escaped": '["\\u0000"]',
    "a lone surrogate": '["\\ud800"]',
    "a lone surrogate in a channel": '[["tests", "\\udfff"]]',
    "deep nesting": "[" * 3000,
    "deep nesting, closed": "[" * 3000 + "]" * 3000,
    "deep objects": '{"a":' * 1500,
    "as long as can be": "x" * _LONGEST,
    "a long list": "[%s1]" % ("1," * 3900),
    "control characters": "\x01\x1b[31m\r\nfaked line\x7f",
    "cut off": '[["tests", "a',
    "two values": "[] []",
}


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


_READERS = [json.loads]


@pytest.fixture(scope="module")
def readers():
    """What the series read a payload with."""
    _READERS[1:] = [_orjson_of_odoo(without_package).loads for without_package in (False, True)]


def _dispatch(payload):
    """Do with ``payload`` what the dispatchers of all series do; return the channels."""
    seen = []
    for loads in _READERS:
        found = []
        found.extend(loads(payload))
        seen.append({tuple(channel) if isinstance(channel, list) else channel for channel in found})
    assert seen[1:] == seen[:-1]
    return seen[0]


@pytest.mark.usefixtures("readers")
@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_payloads)
@example('["\\ud800"]')
@example("[[1e999]]")
@example("[NaN]")
@example("[[18446744073709551616]]")
@example('[{"a": 1}]')
@example('["\\u0000\\u2028"]')
def test_what_is_digestible_can_be_read_by_the_bus_of_every_series(payload):
    clean = digestible(payload)
    if clean is not None:
        _dispatch(clean)


@settings(max_examples=300, deadline=None)
@given(st.lists(_channels, max_size=5))
@example([["bus_alt", "res.partner", 3], ["bus_alt", "broadcast"], "tests", ["bus_alt", "ir.attachment", 4, "😀"]])
def test_what_odoo_sends_is_digestible_and_stays_what_it_is(channels):
    for payload in (json.dumps(channels, separators=(",", ":")), json.dumps(channels, ensure_ascii=False)):
        assert json.loads(digestible(payload)) == channels


@pytest.mark.usefixtures("readers")
@pytest.mark.parametrize("name", _HOSTILE)
def test_hostile_payloads_are_refused_or_harmless(name):
    clean = digestible(_HOSTILE[name])
    assert (clean is None) == (name != "NUL, escaped")
    if clean is not None:
        assert _dispatch(clean) == {"\0"}


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
    for payload in _HOSTILE.values():
        sender.notify(payload)
    stack.send("payload", "after the garbage")
    client.wait_for("after the garbage")
    for payload in _random_payloads(3000):
        sender.notify(payload)
    client.subscribe(["payload"], stack.last_id())
    stack.send("payload", "after much garbage")
    client.wait_for("after much garbage")
    sender.close()

    log = stack.odoo.log_since(begin)
    assert not re.search("Traceback|ERROR|CRITICAL", log), log
    ((_pid, level, message),) = troubles(stack, begin)
    assert level == "WARNING"
    assert re.match(r"dropped a notification .*, sent by backend pid \d+ on channel imbus: ", message)
    assert re.search(r": '\\x1b\[31m\\xe9\\nfaked line\\u202ey+'$", message)
    assert len(message) < 300
