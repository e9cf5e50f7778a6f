"""Whatever anybody sends on imbus, Odoo's dispatcher gets only what it can read."""

import collections
import contextlib
import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bus_alt_connection.payload import BUS_CHANNEL, CRON_CHANNEL, fold, fold_plain, quote, readable
from tests.support.payloads import HOSTILE, READERS

_parts = st.text(max_size=20) | st.none() | st.integers(0, 10**9)
_channels = st.text(min_size=1, max_size=20) | st.lists(_parts, min_size=1, max_size=4)
_values = st.recursive(
    _channels | st.booleans() | st.floats() | st.integers(-(2**70), 2**70),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=30,
)
#: texts that look like payloads, more or less
_payloads = st.text(alphabet='[]{}",:\\u0019dD8eEtfn- \n\x00\ud800', max_size=60) | st.builds(
    json.dumps, st.lists(_values, max_size=4), ensure_ascii=st.booleans()
)


def _dispatch(payload, series=19):
    """Do with ``payload`` what the dispatcher of a series does, with each of its JSON libraries; return the channels.

    :raise Exception: the dispatcher would pause
    """
    take = _take_up_to_19_1 if series <= 19.1 else _take_in_20_0
    seen = [take(loads(payload)) for loads in READERS]
    assert seen[1:] == seen[:-1]
    return seen[0]


def _take_up_to_19_1(channels):
    found = []
    found.extend(channels)
    assert all(isinstance(channel, (str, list)) for channel in found)
    return {_tuplify(channel) for channel in found}


def _take_in_20_0(channels):
    by_database = collections.defaultdict(list)
    for channel in channels:
        # Builds from before the release, such as 19.5, had no "except", and paused after an empty channel.
        assert len(channel) > 0
        with contextlib.suppress(TypeError):
            by_database[channel[0]].append(_tuplify(channel))
    return {channel for channels in by_database.values() for channel in channels}


def _tuplify(channel):
    return tuple(channel) if isinstance(channel, list) else channel


@pytest.mark.parametrize("series", [19.1, 20.0])
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_payloads)
@example("[[18446744073709551616]]")
@example('[["a", ["b", [{"a": 1}]]]]')
@example("[%s1%s]" % ("[" * 500, "]" * 500))
def test_what_is_readable_can_be_read_by_the_bus_of_its_series(series, payload):
    clean = readable(payload, series)
    if clean is not None:
        _dispatch(clean, series)


@pytest.mark.parametrize("series", [19.1, 20.0])
@settings(max_examples=50, deadline=None)
@given(st.lists(_channels, max_size=5))
@example([["bus_alt", "res.partner", 3], ["bus_alt", "broadcast"], "tests", ["bus_alt", "ir.attachment", 4, "😀"]])
def test_what_odoo_sends_is_readable_and_stays_what_it_is(series, channels):
    for payload in (json.dumps(channels, separators=(",", ":")), json.dumps(channels, ensure_ascii=False)):
        assert json.loads(readable(payload, series)) == channels


@pytest.mark.parametrize(("nested", "rest"), [([], []), (["bus_alt", "tests"], [5]), ([["a", None], "b"], ["c", 1])])
def test_after_19_1_a_list_may_be_the_first_element_of_a_channel(nested, rest):
    channels = [["bus_alt", "tests"], [nested, *rest]]
    assert readable(json.dumps(channels), 19.1) is None
    clean = readable(json.dumps(channels), 20.0)
    assert json.loads(clean) == channels
    # The other channel is served all the same.
    assert _dispatch(clean, 20.0) == {("bus_alt", "tests")}


@pytest.mark.parametrize("series", [12, 19.1, 20.0])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_payloads_are_refused_or_harmless(name, series):
    harmless = {"NUL, escaped": {"\0"}}
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
        ('a"; DROP TABLE bus_bus; --', '"a""; DROP TABLE bus_bus; --"'),
    ],
)
def test_a_name_is_one_identifier_whatever_is_in_it(name, quoted):
    assert quote(name) == quoted


def test_a_name_that_utf_8_can_not_encode_is_refused():
    for function in (fold, fold_plain):
        with pytest.raises(ValueError):
            function("orders\ud800")
