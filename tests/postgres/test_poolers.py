"""What the listener makes of a pooler on its way, and the check of poolers other than PgBouncer."""

import pytest

from bus_alt_connection import supervisor
from bus_alt_connection.log import CONFIRMED, UNHEARD
from stack.pgbouncer import PgBouncer
from stack.poolers import Odyssey, Pgpool, PinningOdyssey
from tests.support.checking import HEARD, directly_to, odoo_conf, run_check
from tests.support.listening import directly, hand_on_pid, listening
from tests.support.realpoolers import skip_without


@pytest.mark.parametrize("sender", ["server", "pooler"])
@pytest.mark.parametrize("hands_on_pid", [False, True], ids=["with a pid of its own", "that hands on the pid"])
def test_a_pooler_that_loses_listen_is_called_one(request, pooler, monkeypatch, sender, hands_on_pid):
    if hands_on_pid:
        hand_on_pid(monkeypatch)
    monkeypatch.setattr(supervisor, "CHECK_TIMEOUT", 1.0)
    with listening(request.getfixturevalue(sender), directly(pooler)) as running:
        assert "is a pooler that does not keep the connection" in running.events.wait_for(UNHEARD).reason


@pytest.mark.parametrize("pooled", [False, True], ids=["server", "pooler"])
def test_listeners_hear_where_listen_is_kept_and_change_settings_of_the_server_only(server, pooler, pooled):
    with PgBouncer(server, settings={"pool_mode": "session"}) as keeping:
        mark = server.log_mark()
        with listening(pooler, directly(keeping if pooled else server)) as running:
            session = running.events.expect(CONFIRMED).session
            assert session.facts.pooled == pooled and session.confirmed == {"imbus"}
            server.execute("NOTIFY imbus, '[\"a\"]'")
            assert running.feed.get() == ("imbus", '["a"]')
        # Others may get the server connection of a pooler when we are gone.
        assert ("'idle_session_timeout'" in server.log_since(mark)) != pooled


def test_a_session_that_was_not_heard_yet_changes_no_settings(server):
    mark = server.log_mark()
    session = directly(server)()
    session.listen(frozenset(["imbus"]), lambda *_warning: None)
    session.close()
    assert "idle_session_timeout" not in server.log_since(mark)


@pytest.mark.rest
@pytest.mark.parametrize(
    ("pooler", "without_way_past"),
    [
        (Odyssey, "NOT OK: 1 error(s)"),
        (PinningOdyssey, "OK; but the pooler keeps sessions, so Odoo needs no addon to listen"),
        # It hands on the pid as well, so there is no telling it from a server.
        (Pgpool, "OK; but Odoo uses no pooler, or one that keeps sessions, so it needs no addon to listen"),
    ],
)
def test_the_check_says_of_a_real_pooler_what_it_is_good_for(server, tmp_path, pooler, without_way_past):
    skip_without(pooler)
    with pooler(server) as other:
        code, output = run_check(tmp_path, odoo_conf(other), directly_to(other))
        assert (code, output.splitlines()[-1]) == (without_way_past.startswith("NOT"), without_way_past)
        with_way_past = HEARD if code else without_way_past
        assert with_way_past in run_check(tmp_path, odoo_conf(other), directly_to(server))[1]
