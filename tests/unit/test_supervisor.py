"""The supervisor finds out whether the listener hears, why not, and gives what was missed: in rounds, by times."""

import threading

import psycopg2
import pytest

from bus_alt_connection import supervisor as supervisor_module
from bus_alt_connection.catchup import Backlog
from bus_alt_connection.cursor import FEED_SIZE, Feed
from bus_alt_connection.log import CONFIRMED, FAILED, LOST, UNHEARD
from bus_alt_connection.supervisor import DEAF as DEAF_MODE
from bus_alt_connection.supervisor import LISTENING, POLLING
from tests.unit.fakes import FakeFeed, connected

LOST_ONE = ("imbus", '["lost?"]')


@pytest.fixture(autouse=True)
def short_waits(clock, monkeypatch):
    """Some things take their time all the same."""
    monkeypatch.setattr(supervisor_module, "CHECK_TIMEOUT", 0.1)
    monkeypatch.setattr(supervisor_module, "GRACE", 0.01)


@pytest.fixture
def feed():
    return FakeFeed("imbus")


@pytest.fixture
def watched(events, listen, supervise, run, feed):
    """A listener that hears, with its supervisor, which is returned."""
    supervisor = supervise(listen(feed))
    connected(supervisor.listener)
    run(supervisor, 300, 20)
    events.expect(CONFIRMED)
    assert feed.all() == []
    return supervisor


# What was missed


def test_what_was_sent_in_an_outage_is_given_after_it_once(fake, events, watched, run, feed):
    fake.refuse()
    fake.cut()
    events.expect(LOST)
    fake.write("x", '"lost?"')
    fake.now += 100
    fake.forward()
    connected(watched.listener)
    run(watched, 300)
    assert feed.all() == [LOST_ONE]


def test_what_nobody_was_there_for_stays_owed_while_it_polls(fake, events, listen, supervise, run):
    bus, cron = FakeFeed("imbus"), FakeFeed("cron_trigger")
    supervisor = supervise(listen(bus, cron))
    listener = supervisor.listener
    connected(listener)
    run(supervisor, 300, 20)
    fake.refuse()
    fake.cut()
    events.wait_for(LOST)
    run(supervisor, 30)
    bus.all()
    # Odoo's loop of the bus crashes and comes back later than dates tell; cron keeps the listener.
    listener.remove(bus)
    fake.write("x", '"lost?"')
    run(supervisor, 100)
    listener.add(bus)
    run(supervisor, 100)
    assert LOST_ONE in bus.all()


def test_what_nobody_took_because_its_loop_ended_meanwhile_goes_to_the_next(
    fake, events, listen, supervise, run, monkeypatch
):
    backlog, first, second = Backlog(fake.opening), FakeFeed("imbus"), FakeFeed("imbus")
    supervisor = supervise(listen(first), backlog=backlog)
    connected(supervisor.listener)
    run(supervisor, 300, 20)
    fake.refuse()
    fake.cut()
    events.wait_for(LOST)
    fake.write("x", '"lost?"')
    fake.now += 100
    fake.forward()
    connected(supervisor.listener)
    deliver = supervisor._deliver

    def deliver_once_the_loop_has_ended(channels):
        supervisor.listener.remove(first)
        return deliver(channels)

    with monkeypatch.context() as patch:
        patch.setattr(supervisor, "_deliver", deliver_once_the_loop_has_ended)
        supervisor.round(fake.now)
    fake.now += 100
    following = supervise(listen(second), backlog=backlog)
    connected(following.listener)
    run(following, 100)
    assert first.all() + second.all() == [LOST_ONE]


def test_a_cron_that_is_busy_for_long_costs_nothing(fake, listen, supervise, run, monkeypatch):
    busy = FakeFeed("cron_trigger")
    supervisor = supervise(listen(FakeFeed("imbus"), busy))
    connected(supervisor.listener)
    run(supervisor, 300, 20)
    fake.logins.clear()
    busy.full = True
    for _ in range(100):
        fake.notify("cron_trigger", "x")
    run(supervisor, 20)
    assert len(fake.logins) <= 2


def test_a_database_that_refused_last_time_comes_after_others(fake, events, listen, supervise, run, monkeypatch):
    both = FakeFeed("imbus", "cron_trigger")
    supervisor = supervise(listen(both), databases=["exhausted", "x"])
    connected(supervisor.listener)
    run(supervisor, 300, 20)
    fake.cut()
    events.wait_for(LOST)
    session = connected(supervisor.listener)
    fake.away.add("exhausted")
    run(supervisor, 5)
    fake.write("x", '"lost?"', notify=False)
    seen = []

    def noting(open_database):
        return lambda name: seen.append((name, session.confirmed)) or open_database(name)

    monkeypatch.setattr(supervisor, "_opening", noting(fake.opening))
    monkeypatch.setattr(supervisor._backlog, "_opening", noting(fake.opening))
    supervisor._backlog.add_pending(["x"], fake.now)
    run(supervisor, 5)
    names = [name for name, _confirmed in seen]
    assert names.index("x") < names.index("exhausted")
    # Checks come before looks.
    assert all(confirmed for _name, confirmed in seen)


def test_what_a_database_is_owed_survives_checks_that_pass_meanwhile(fake, events, watched, run, feed):
    fake.refuse()
    fake.cut()
    events.expect(LOST)
    watched.round(fake.now)
    fake.write("x", '"lost?"')
    fake.now += 100
    # The pool of x is exhausted as the listener is back.
    fake.away.add("x")
    fake.forward()
    connected(watched.listener)
    run(watched, 300)
    assert events.after(FAILED).kind == CONFIRMED
    assert watched.mode == LISTENING and feed.all() == []
    fake.away.clear()
    run(watched, 120)
    assert feed.all() == [LOST_ONE]


def test_checks_do_not_count_while_only_cron_is_listened_to(fake, events, listen, supervise, run):
    bus, cron = FakeFeed("imbus"), FakeFeed("cron_trigger")
    listener = listen(bus, cron)
    supervisor = supervise(listener)
    connected(supervisor.listener)
    run(supervisor, 300, 20)
    # Odoo's loop of the bus is gone for a while, that of cron is not.
    listener.remove(bus)
    listener.wait(lambda: "imbus" not in listener.session.channels, 5)
    run(supervisor, 10)
    fake.write("x", '"lost?"')
    run(supervisor, 300)
    listener.add(bus)
    listener.listen(bus, frozenset(["imbus"]))
    listener.wait_for_listen(bus, 5)
    run(supervisor, 10)
    assert LOST_ONE in bus.all()


def test_what_is_owed_outlives_listener_and_supervisor(fake, events, listen, supervise, run):
    backlog = Backlog(fake.opening)
    first, second = FakeFeed("imbus"), FakeFeed("imbus")
    supervisor = supervise(listen(first), backlog=backlog)
    connected(supervisor.listener)
    run(supervisor, 300, 20)
    # Odoo's loop crashes, and comes back later.
    supervisor.listener.remove(first)
    fake.write("x", '"lost?"')
    fake.now += 300
    again = supervise(listen(second), backlog=backlog)
    connected(again.listener)
    run(again, 10)
    assert LOST_ONE in second.all()


def test_a_loop_that_is_gone_for_the_time_of_one_round_misses_nothing(fake, events, watched, run, feed):
    other = FakeFeed("cron_trigger")
    listener = watched.listener
    listener.add(other)
    listener.listen(other, other.channels)
    listener.wait_for_listen(other, 5)
    run(watched, 60)
    # The round takes long, since the pooler hangs.
    listener.remove(feed)
    listener.wait(lambda: "imbus" not in listener.session.channels, 5)
    fake.write("x", '"lost?"')
    fake.now += 100
    listener.add(feed)
    listener.listen(feed, frozenset(["imbus"]))
    listener.wait_for_listen(feed, 5)
    run(watched, 300)
    assert LOST_ONE in feed.all()


def test_databases_are_asked_once_though_another_can_not_be(fake, events, listen, supervise, run, feed):
    fake.write("healthy", '"one"', notify=False)
    fake.away.add("broken")
    supervisor = supervise(listen(feed), databases=["healthy", "broken"])
    connected(supervisor.listener)
    run(supervisor, 60)
    assert fake.asked.count("healthy") == 1
    assert feed.all() == [("imbus", '["one"]')]
    assert fake.logins.count("broken") <= 9


def test_a_database_that_is_gone_is_owed_nothing(fake, events, watched, run, feed):
    fake.refuse()
    fake.cut()
    events.expect(LOST)
    fake.away.add("x")
    del fake.rows["x"]
    fake.forward()
    connected(watched.listener)
    run(watched, 10)
    fake.logins.clear()
    run(watched, 300)
    assert "x" not in fake.logins


@pytest.mark.parametrize("poll_interval", [0, 5])
def test_cron_does_not_keep_the_bus_from_what_it_missed(fake, events, listen, supervise, options, poll_interval):
    options.poll_interval = poll_interval
    both = FakeFeed("imbus", "cron_trigger")
    supervisor = supervise(listen(both))
    connected(supervisor.listener)
    fake.now = max(supervisor.round(fake.now), fake.now + 60)
    fake.cut()
    events.wait_for(LOST)
    connected(supervisor.listener)
    both.all()
    fake.write("x", '"lost?"', notify=False)
    # The pool of x has room, that of postgres has none.
    fake.away.add("postgres")
    end = fake.now + 60
    while fake.now < end:
        fake.now = max(supervisor.round(fake.now), fake.now + 0.1)
    # Polling, where it is on, may give it once more.
    assert {item for item in both.all() if item[0] == "imbus"} == {LOST_ONE}


def test_cron_is_woken_for_all_databases_after_an_outage_but_not_at_the_start(fake, events, listen, supervise, run):
    cron = FakeFeed("cron_trigger")
    supervisor = supervise(listen(cron), databases=["x", "y"])
    connected(supervisor.listener)
    supervisor.round(fake.now)
    assert cron.all() == []
    fake.cut()
    events.wait_for(LOST)
    connected(supervisor.listener)
    run(supervisor, 10)
    assert sorted(cron.all()) == [("cron_trigger", name) for name in ("postgres", "x", "y")]


def test_what_a_full_feed_had_no_room_for_comes_later(fake, events, watched, run, feed):
    listener = watched.listener
    full = Feed()
    full.channels = frozenset(["imbus"])
    listener.add(full)
    for number in range(FEED_SIZE + 5):
        fake.write("x", '"%d"' % number)
    assert listener.wait(lambda: listener.dropped, 5)
    run(watched, 60)
    full.poll()
    del full.notifies[:]
    run(watched, 120)
    full.poll()
    assert '"%d"' % (FEED_SIZE + 4) in "".join(one.payload for one in full.notifies)
    full.close()


# Checks


@pytest.mark.parametrize("interval, at_most", [(0.5, 12), (1, 12), (1.9, 12), (2, 12), (4, 8), (60, 2), (0, 1)])
def test_checks_are_as_far_apart_as_was_set(
    fake, events, listen, supervise, options, feed, monkeypatch, interval, at_most
):
    monkeypatch.setattr(supervisor_module, "CHECK_TIMEOUT", 5.0)
    options.check_interval = interval
    supervisor = supervise(listen(feed), databases=[])
    connected(supervisor.listener)
    begin = fake.now
    while fake.now < begin + 10:
        fake.now = max(supervisor.round(fake.now), fake.now + 0.01)
    assert 1 <= len(fake.sent) <= at_most


def test_a_check_that_is_not_heard_replaces_the_session(fake, events, watched, run):
    fake.swallow()
    run(watched, 120, 30)
    event = events.expect(UNHEARD)
    assert event.reason == "the path to db-01:5432 is silent, nothing comes through"


def test_a_session_that_is_cut_while_it_is_checked_is_not_looked_into(fake, events, watched, monkeypatch):
    listener, session = watched.listener, watched.listener.session
    examined, hears = [], listener.wait_for_token

    def hears_after_a_cut(*args):
        fake.cut()
        events.wait_for(LOST)
        return hears(*args)

    monkeypatch.setattr(session, "explaining", lambda *_args: examined.append(session))
    monkeypatch.setattr(listener, "wait_for_token", hears_after_a_cut)
    watched.round(fake.now + 60)
    # It would be two more connections on a path that cuts each.
    assert (examined, session.fault) == ([], None)


@pytest.mark.parametrize(
    "fault, reason",
    [
        ({"deaf_pooler": True}, "is a pooler that does not keep the connection for us"),
        ({"seen_pooled": True}, "is a pooler that does not keep the connection for us"),
        ({"pooled": True}, "is a pooler that does not keep the connection for us"),
        ({"started": 5}, "is another server than the one that Odoo sends to"),
        ({"database": "other"}, "it listens on database other, but Odoo sends on postgres"),
    ],
)
def test_what_is_wrong_with_a_deaf_session_is_told(fake, events, listen, supervise, feed, fault, reason):
    vars(fake).update(fault)
    if "deaf_pooler" not in fault:
        fake.swallow()
    supervisor = supervise(listen(feed))
    connected(supervisor.listener)
    supervisor.round(fake.now)
    assert reason in events.expect(UNHEARD).reason


def test_one_lucky_round_trip_through_a_pooler_is_none(fake, events, listen, supervise, feed):
    fake.pooled = True
    supervisor = supervise(listen(feed))
    connected(supervisor.listener)
    fake.on_notify = lambda session: fake.swallow()
    supervisor.round(fake.now)
    supervisor.listener.wait_for_listen(feed, 5)
    supervisor.round(fake.now)
    assert "is a pooler" in events.expect(UNHEARD).reason


def test_a_pooler_that_keeps_listen_will_do(fake, events, listen, supervise, run, feed):
    fake.pooled = True
    supervisor = supervise(listen(feed))
    connected(supervisor.listener)
    supervisor.round(fake.now)
    supervisor.listener.wait_for_listen(feed, 5)
    run(supervisor, 10)
    assert events.expect(CONFIRMED).session.confirmed == {"imbus"}
    assert supervisor.mode == LISTENING
    fake.notify("imbus", '["a"]')
    assert feed.get() == ("imbus", '["a"]')


def test_a_listener_is_left_alone_while_checks_can_not_be_sent(fake, watched, run, logged):
    session = watched.listener.session
    fake.away.add("pooler")
    run(watched, 300)
    assert watched.listener.session is session and watched.mode == LISTENING
    assert len(logged("can't tell whether the listener")) == 1


def test_a_bug_in_a_round_is_logged_once_a_minute_and_the_rest_goes_on(fake, watched, run, logged, monkeypatch):
    def bug(*_arguments):
        raise KeyError("a bug")

    monkeypatch.setattr(watched.listener, "wait_for_token", bug)
    run(watched, 120)
    assert len(logged("internal error")) == 1
    # What has arrived, whoever looked for it, is as good as another check for a while.
    fake.sent.clear()
    run(watched, 60)
    assert fake.sent


def test_it_ends_with_its_listener(fake, events, listen, supervise, feed):
    supervisor = supervise(listen(feed))
    thread = threading.Thread(target=supervisor.run, daemon=True)
    thread.start()
    events.expect(CONFIRMED)
    supervisor.listener.remove(feed)
    thread.join(5)
    assert not thread.is_alive()


# Polling, and the modes


def test_in_an_outage_it_polls_until_the_listener_has_taken_over(fake, events, watched, run, feed, logged):
    fake.refuse()
    fake.cut()
    events.expect(LOST)
    for number in range(3):
        fake.write("x", '"%d"' % number)
        run(watched, 10)
        assert '"%d"' % number in feed.all()[-1][1]
    assert watched.mode == POLLING
    fake.forward()
    connected(watched.listener)
    run(watched, 10)
    assert events.after(FAILED).kind == CONFIRMED
    assert watched.mode == LISTENING
    assert len(logged("looking into bus_bus every 5 s")) == len(logged("has taken over from polling")) == 1


def test_while_polling_a_look_is_at_what_is_new(fake, events, watched, run, feed):
    fake.refuse()
    fake.cut()
    events.expect(LOST)
    run(watched, 60)
    feed.all()
    fake.write("x", '"once"')
    run(watched, 60)
    assert feed.all() == [("imbus", '["once"]')]


@pytest.mark.parametrize(
    "trouble, mode",
    [
        ("none", LISTENING),
        ("direct", POLLING),
        ("both", DEAF_MODE),
        ("direct, and polling is off", DEAF_MODE),
        ("settings", POLLING),
    ],
)
def test_the_mode_says_how_notifications_arrive(fake, events, listen, supervise, run, options, feed, trouble, mode):
    connect = fake.connect
    if trouble == "settings":

        def connect(_listener=None):
            raise psycopg2.OperationalError("IMDISPATCHER_DB_SSLMODE is wrong")

    elif trouble != "none":
        fake.refuse()
    if trouble == "both":
        fake.away.add("pooler")
    if "off" in trouble:
        options.poll_interval = 0
    supervisor = supervise(listen(feed, connect=connect))
    if trouble == "none":
        connected(supervisor.listener)
    run(supervisor, 60)
    fake.now += supervisor_module.GRACE
    assert supervisor.mode == supervisor.status()["mode"] == mode


@pytest.mark.parametrize("poll_interval", [0, 5])
def test_all_is_well_again_though_the_pooler_was_away_as_the_listener_came_back(
    fake, events, watched, run, options, poll_interval
):
    options.poll_interval = poll_interval
    fake.away.add("pooler")
    fake.cut()
    events.wait_for(LOST)
    connected(watched.listener)
    run(watched, 18)
    assert watched.mode == DEAF_MODE
    fake.away.clear()
    run(watched, 10)
    assert watched.mode == LISTENING
    status = watched.status()
    assert (status["confirmed"], status["reconnects"]) == (True, 1)


def test_only_the_bus_is_polled(fake, events, listen, supervise, run):
    fake.refuse()
    supervisor = supervise(listen(FakeFeed("cron_trigger")))
    events.expect(FAILED)
    run(supervisor, 60)
    assert not fake.asked and supervisor.mode == POLLING


def test_a_listener_that_works_is_a_problem_if_nothing_can_be_sent(fake, events, watched, run):
    run(watched, 5)
    assert (watched.mode, watched.status()["problem"]) == (LISTENING, None)
    fake.away.add("pooler")
    run(watched, 65)
    assert watched.mode == LISTENING
    assert "nothing can be sent" in watched.status()["problem"]
    fake.away.clear()
    run(watched, 5)
    assert watched.status()["problem"] is None


def test_an_overdue_check_is_a_problem(watched, run, monkeypatch):
    run(watched, 5)
    watched._last_check -= 60 + supervisor_module.CHECK_TIMEOUT + 1
    assert "older than the check interval" in watched.status()["problem"]


@pytest.mark.parametrize("pooled, leader_pid, needed", [(False, None, False), (True, None, True), (True, 7, False)])
def test_behind_a_pooler_only_a_token_of_ones_own_is_proof(watched, pooled, leader_pid, needed):
    """PgDog before 0.1.52 takes channels of the same name in two databases for one."""
    session = watched.listener.session
    session.facts = session.facts._replace(pooled=pooled)
    session.leader_pid = leader_pid
    session.heard_at = now = 1000.0
    watched._span = 50.0
    assert watched._needs_token(session, session.facts, now + 40) is needed
    assert watched._needs_token(session, session.facts, now + 49.5)
    assert watched._needs_token(session, session.facts._replace(started=5), now)
