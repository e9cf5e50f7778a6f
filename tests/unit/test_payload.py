"""Whatever anybody sends on imbus, Odoo's dispatcher gets only what it can read."""

import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bus_alt_connection.payload import BUS_CHANNEL, CRON_CHANNEL, fold, fold_plain, quote, readable
from tests.support.payloads import HOSTILE, READERS

_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.integers(-(2**70), 2**70)
_json_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=30,
)
_channels = st.text(min_size=1, max_size=20) | st.lists(
    st.text(max_size=20) | st.integers(0, 10**9), min_size=1, max_size=4
)
_parts = st.text(max_size=5) | st.none() | st.integers(0, 10**9)
_nested = st.recursive(_parts, lambda inner: st.lists(inner, max_size=3), max_leaves=5)
#: texts that look like payloads, more or less
_payloads = st.one_of(
    st.text(max_size=200),
    st.text(alphabet='[]{}",:\\u0019dD8eEtfn- \n\x00\ud800', max_size=60),
    st.builds(json.dumps, _json_values, ensure_ascii=st.booleans()),
    st.builds(json.dumps, st.lists(_json_values, max_size=4), ensure_ascii=st.booleans()),
    st.builds(json.dumps, st.lists(_channels, max_size=4), ensure_ascii=st.booleans()),
)


def _hashable(channel):
    return tuple(map(_hashable, channel)) if isinstance(channel, list) else channel


def _dispatch(payload, series=19):
    """Do with ``payload`` what the dispatchers up to ``series`` do; return the channels."""
    seen = []
    for loads in READERS:
        found = []
        found.extend(loads(payload))
        # That of 19.5 takes the first part of each for a database.
        assert all(isinstance(channel, (str, list)) and channel for channel in found)
        hashable = tuple if series <= 19.1 else _hashable
        seen.append({hashable(channel) if isinstance(channel, list) else channel for channel in found})
    assert seen[1:] == seen[:-1]
    return seen[0]


@pytest.mark.parametrize("series", [19.1, 19.2])
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_payloads)
@example('["\\ud800"]')
@example("[[1e999]]")
@example("[NaN]")
@example("[[18446744073709551616]]")
@example('[{"a": 1}]')
@example('["\\u0000\\u2028"]')
@example('[["a", ["b", [{"a": 1}]]]]')
@example("[%s1%s]" % ("[" * 500, "]" * 500))
def test_what_is_readable_can_be_read_by_the_bus_of_its_series(series, payload):
    clean = readable(payload, series)
    if clean is not None:
        _dispatch(clean, series)


@pytest.mark.parametrize("series", [19.1, 19.2])
@settings(max_examples=100, deadline=None)
@given(st.lists(_channels, max_size=5))
@example([["bus_alt", "res.partner", 3], ["bus_alt", "broadcast"], "tests", ["bus_alt", "ir.attachment", 4, "😀"]])
def test_what_odoo_sends_is_readable_and_stays_what_it_is(series, channels):
    for payload in (json.dumps(channels, separators=(",", ":")), json.dumps(channels, ensure_ascii=False)):
        assert json.loads(readable(payload, series)) == channels


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(_nested, min_size=1, max_size=4)))
@example([["bus_alt", ["res.partner", 3], None]])
def test_nested_channels_are_readable_after_19_1(channels):
    nested = any(isinstance(part, list) for channel in channels for part in channel)
    payload = json.dumps(channels)
    assert json.loads(readable(payload, 19.2)) == channels
    assert (readable(payload, 19.1) is None) == nested


@pytest.mark.parametrize("series", [12, 19.1, 19.2])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_payloads_are_refused_or_harmless(name, series):
    harmless = {"NUL, escaped": {"\0"}}
    if series > 19.1:
        harmless["an unhashable channel"] = {("tests", ("tests",))}
    clean = readable(HOSTILE[name], series)
    assert (clean is None) == (name not in harmless)
    if clean is not None:
        assert _dispatch(clean, series) == harmless[name]


@pytest.mark.parametrize(
    "name, quoted",
    [
        # As Odoo has them.
        (BUS_CHANNEL, "imbus"),
        (CRON_CHANNEL, "cron_trigger"),
        ("queue_job", '"queue_job"'),
        ('a"; DROP TABLE bus_bus; --', '"a""; DROP TABLE bus_bus; --"'),
    ],
)
def test_a_name_is_one_identifier_whatever_is_in_it(name, quoted):
    assert quote(name) == quoted


@pytest.mark.parametrize(
    "name, folded",
    [
        ("A b", "A b"),
        ("x" * 63, "x" * 63),
        ("x" * 64, "x" * 63),
        # 62 bytes and a character of two, of three, of four, which does not fit.
        ("x" * 62 + "é", "x" * 62),
        ("x" * 62 + "€", "x" * 62),
        ("x" * 62 + "😀", "x" * 62),
        ("x" * 61 + "éy", "x" * 61 + "é"),
    ],
)
def test_a_quoted_name_is_truncated_between_characters(name, folded):
    assert fold(name) == folded


def test_an_unquoted_name_is_folded_in_its_ascii_letters_only():
    assert fold_plain("Orders_Ä\u0130") == "orders_Ä\u0130"
    assert fold_plain("X" * 62 + "é") == "x" * 62


@pytest.mark.parametrize("function", [fold, fold_plain])
def test_a_name_that_utf_8_can_not_encode_is_refused(function):
    with pytest.raises(ValueError):
        function("orders\ud800")
