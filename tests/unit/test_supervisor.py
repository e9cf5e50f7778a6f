"""The supervisor finds out whether the listener hears, why it does not, and delivers what it missed: by rounds."""

import threading

import pytest

from bus_alt_connection import catchup
from bus_alt_connection import supervisor as supervisor_module
from bus_alt_connection.catchup import Backlog
from bus_alt_connection.cursor import FEED_SIZE, Feed
from bus_alt_connection.log import CONFIRMED, FAILED, LOST, UNHEARD
from bus_alt_connection.supervisor import DEAF as DEAF_MODE
from bus_alt_connection.supervisor import LISTENING, POLLING, Supervisor
from tests.unit.fakes import FakeFeed, connected

MISSED = ("imbus", '["missed"]')


@pytest.fixture
def feed():
    return FakeFeed("imbus")


@pytest.fixture
def watch(listen, supervise, run):
    """Return a function that makes a supervisor whose listener serves ``feeds``, and has heard itself for a while."""

    def watch(*feeds, **more):
        supervisor = supervise(listen(*feeds), **more)
        connected(supervisor.listener)
        run(300, supervisor, step=20)
        assert supervisor.mode == LISTENING and not any(feed.all() for feed in feeds)
        return supervisor

    return watch


@pytest.fixture
def watched(watch, feed, events):
    supervisor = watch(feed)
    events.expect(CONFIRMED)
    return supervisor


@pytest.fixture
def lose(fake, events):
    """Return a function that cuts the direct way until ``fake.forward()``."""

    def lose():
        fake.refuse()
        fake.cut()
        events.wait_for(LOST)

    return lose


def come_back(fake, supervisor):
    fake.now += 100
    fake.forward()
    connected(supervisor.listener)


# What was missed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("away", [set(), {"postgres"}], ids=["", "checks can't be sent"])
def test_what_was_sent_in_an_outage_is_delivered_once_it_is_over_and_once_only(fake, watched, run, feed, lose, away):
    lose()
    fake.write("x", '"missed"')
    fake.away = away
    come_back(fake, watched)
    run(5, watched)
    assert feed.all() == [MISSED]
    fake.away = set()
    run(300, watched)
    assert feed.all() == [] and watched.mode == LISTENING


def test_what_a_database_missed_is_delivered_once_it_answers_though_checks_pass_meanwhile(
    fake, events, watched, run, feed, lose
):
    lose()
    watched.round(fake.now)
    fake.write("x", '"missed"')
    fake.away.add("x")
    come_back(fake, watched)
    fake.logins.clear()
    run(300, watched)
    assert events.wait_for(CONFIRMED) and feed.all() == []
    # No database is asked all the time, and checks are not kept from passing.
    assert fake.logins.count("x") <= 300 / catchup.LONGEST_DELAY + 6 and watched.mode == LISTENING
    fake.away.clear()
    run(120, watched)
    assert feed.all() == [MISSED]


@pytest.mark.parametrize("when", ["before the message", "as it is delivered"])
def test_what_the_loop_of_the_bus_missed_because_it_ended_is_delivered_to_the_next_loop(
    fake, watch, listen, supervise, run, lose, when
):
    backlog, first, second = Backlog(fake.opening), FakeFeed("imbus"), FakeFeed("imbus")
    supervisor = watch(first, backlog=backlog)
    listener = supervisor.listener
    if when == "before the message":
        listener.remove(first)
        fake.write("x", '"missed"')
    else:
        lose()
        fake.write("x", '"missed"')
        come_back(fake, supervisor)
        deliver = listener.deliver
        listener.deliver = lambda notifications: listener.remove(first) or deliver(notifications)
        supervisor.round(fake.now)
    fake.now += 300
    following = supervise(listen(second), backlog=backlog)
    connected(following.listener)
    run(10, following)
    assert first.all() == [] and second.all() == [MISSED]


def test_what_is_sent_while_only_cron_listens_is_delivered_to_the_bus_afterwards(fake, watch, run):
    bus, cron = FakeFeed("imbus"), FakeFeed("cron_trigger")
    supervisor = watch(bus, cron)
    listener = supervisor.listener
    # For the time of one round, or of several checks.
    for seconds in (0, 300):
        listener.remove(bus)
        listener.wait(lambda: "imbus" not in listener.session.channels, 5)
        run(seconds / 30, supervisor)
        fake.write("x", '"missed"')
        fake.now += 100
        run(seconds, supervisor)
        listener.add(bus)
        listener.listen(bus, frozenset(["imbus"]))
        listener.wait_for_listen(bus, 5)
        run(10, supervisor)
        assert MISSED in bus.all()


def test_what_a_full_feed_had_no_room_for_is_looked_up_at_most_every_few_seconds(fake, watched, run, feed):
    listener, full = watched.listener, Feed()
    full.channels = frozenset(["imbus"])
    listener.add(full)
    for number in range(FEED_SIZE + 5):
        fake.write("x", '"%d"' % number)
    assert listener.wait(lambda: listener.dropped, 5)
    fake.logins.clear()
    run(60, watched)
    assert 2 <= fake.logins.count("x") <= 60 / supervisor_module.DROPPED_INTERVAL + 1
    full.poll()
    del full.notifies[:]
    run(120, watched)
    full.poll()
    assert '"%d"' % (FEED_SIZE + 4) in "".join(each.payload for each in full.notifies)
    full.close()


def test_a_cron_that_is_busy_for_long_causes_no_look_ups(fake, watch, run):
    busy = FakeFeed("cron_trigger")
    supervisor = watch(FakeFeed("imbus"), busy)
    fake.logins.clear()
    busy.full = True
    for _ in range(20):
        fake.notify("cron_trigger", "x")
        fake.settle()
    run(20, supervisor)
    assert len(fake.logins) <= 2


def test_cron_is_woken_for_all_databases_after_an_outage_but_not_at_the_start(fake, events, listen, supervise, run):
    cron = FakeFeed("cron_trigger")
    supervisor = supervise(listen(cron), databases=["x", "y"])
    connected(supervisor.listener)
    run(1, supervisor)
    assert cron.all() == []
    fake.cut()
    events.wait_for(LOST)
    connected(supervisor.listener)
    run(10, supervisor)
    assert sorted(cron.all()) == [("cron_trigger", name) for name in ("postgres", "x", "y")]


# Checks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval, at_most", [(0.5, 12), (4, 8), (0, 1)])
def test_checks_are_as_far_apart_as_was_set(fake, listen, supervise, options, feed, run, interval, at_most):
    options.check_interval = interval
    supervisor = supervise(listen(feed), databases=[])
    connected(supervisor.listener)
    run(10, supervisor)
    assert 1 <= len(fake.sent) <= at_most


@pytest.mark.parametrize(
    "fault, reason",
    [
        ({}, "the path to db-01:5432 is silent, nothing comes through"),
        ({"deaf_pooler": True}, "is a pooler that does not keep the connection for us"),
        ({"started": 5}, "is another server than the one that Odoo sends to"),
    ],
)
def test_a_check_that_is_not_heard_replaces_the_session_and_says_why(
    fake, events, listen, supervise, run, feed, fault, reason
):
    vars(fake).update(fault)
    if "deaf_pooler" not in fault:
        fake.swallow()
    supervisor = supervise(listen(feed))
    session = connected(supervisor.listener)
    run(1, supervisor)
    assert reason in events.expect(UNHEARD).reason
    connected(supervisor.listener, after=session)


def test_a_session_that_is_lost_while_it_is_checked_is_not_examined(fake, events, watched):
    """That would be two more connections on a path that cuts each."""
    listener, session = watched.listener, watched.listener.session
    wait_for_token, examined = listener.wait_for_token, []

    def wait_after_a_cut(*args):
        fake.cut()
        events.wait_for(LOST)
        return wait_for_token(*args)

    session.explaining = lambda *_args: examined.append(session)
    listener.wait_for_token = wait_after_a_cut
    watched.round(fake.now + 60)
    assert (examined, session.fault) == ([], None)


def test_behind_a_pooler_a_second_token_has_to_arrive(fake, events, listen, supervise, run, feed):
    fake.pooled = True
    supervisor = supervise(listen(feed))
    connected(supervisor.listener)
    # The first may have been luck.
    fake.on_notify = lambda session: fake.swallow()
    run(10, supervisor)
    assert "is a pooler" in events.expect(UNHEARD).reason
    fake.on_notify = lambda session: None
    fake.forward()
    run(30, supervisor)
    assert events.wait_for(CONFIRMED).session.confirmed == {"imbus"} and supervisor.mode == LISTENING
    fake.notify("imbus", '["a"]')
    assert feed.get() == ("imbus", '["a"]')


@pytest.mark.parametrize("pooled, leader_pid, needed", [(False, None, False), (True, None, True), (True, 7, False)])
def test_behind_a_pooler_only_a_token_of_this_process_is_proof(watched, pooled, leader_pid, needed):
    """PgDog before 0.1.52 takes channels of the same name in two databases for one."""
    session = watched.listener.session
    session.facts = session.facts._replace(pooled=pooled)
    session.leader_pid = leader_pid
    session.heard_at, watched._span = 1000.0, 50.0
    assert watched._needs_token(session, session.facts, 1040.0) is needed
    assert watched._needs_token(session, session.facts, 1049.5)
    assert watched._needs_token(session, session.facts._replace(started=5), 1000.0)


def test_a_listener_is_left_alone_while_checks_can_not_be_sent_and_health_says_so(fake, watched, run, logged):
    session = watched.listener.session
    run(5, watched)
    assert watched.status()["problem"] is None
    fake.away.add("pooler")
    run(300, watched)
    assert watched.listener.session is session and watched.mode == LISTENING
    assert len(logged("can't tell whether the listener")) == 1
    assert "nothing can be sent" in watched.status()["problem"]
    fake.away.clear()
    run(5, watched)
    assert watched.status()["problem"] is None
    fake.now += 300
    assert "older than the check interval" in watched.status()["problem"]


def test_a_bug_in_a_round_is_logged_once_a_minute_and_the_rest_goes_on(fake, watched, run, logged, feed):
    def bug(*_arguments):
        raise KeyError("a bug")

    watched.listener.wait_for_token = bug
    run(50, watched)
    watched._backlog.add_pending(["x"], fake.now)
    fake.asked.clear()
    run(70, watched)
    assert len(logged("internal error")) == 1 and fake.asked


def test_it_runs_until_its_listener_ends(fake, events, listen, supervise, feed, options):
    made = supervise(listen(feed))
    supervisor = Supervisor(made.listener, fake.opening, made._databases, made._backlog, options)
    thread = threading.Thread(target=supervisor.run, daemon=True)
    thread.start()
    events.expect(CONFIRMED)
    supervisor.listener.remove(feed)
    thread.join(5)
    assert not thread.is_alive()


# Polling, and the modes -----------------------------------------------------------------------------------------------


def test_in_an_outage_it_polls_what_is_new_until_the_listener_has_taken_over(
    fake, events, watched, run, feed, lose, logged
):
    lose()
    run(60, watched)
    for number in range(3):
        fake.write("x", '"%d"' % number)
        run(30, watched)
        assert feed.all() == [("imbus", '["%d"]' % number)]
    assert watched.mode == POLLING
    come_back(fake, watched)
    run(10, watched)
    assert events.wait_for(CONFIRMED) and watched.mode == LISTENING
    assert len(logged("looking into bus_bus every 5 s")) == len(logged("has taken over from polling")) == 1


@pytest.mark.parametrize(
    "away, poll_interval, mode, problem",
    [((), 5, POLLING, "late"), (("pooler",), 5, DEAF_MODE, "do not arrive"), ((), 0, DEAF_MODE, "do not arrive")],
)
def test_the_mode_says_how_notifications_arrive(
    fake, events, listen, supervise, run, options, feed, away, poll_interval, mode, problem
):
    fake.refuse()
    fake.away.update(away)
    options.poll_interval = poll_interval
    supervisor = supervise(listen(feed))
    events.expect(FAILED)
    run(60, supervisor)
    assert supervisor.mode == supervisor.status()["mode"] == mode
    assert problem in supervisor.status()["problem"]


@pytest.mark.parametrize("poll_interval", [0, 5])
def test_all_is_well_again_though_the_pooler_was_away_as_the_listener_came_back(
    fake, watched, run, options, lose, poll_interval
):
    options.poll_interval = poll_interval
    fake.away.add("pooler")
    lose()
    come_back(fake, watched)
    run(18, watched)
    assert watched.mode == DEAF_MODE
    fake.away.clear()
    run(10, watched)
    assert watched.mode == LISTENING
    assert (watched.status()["confirmed"], watched.status()["reconnects"]) == (True, 1)


def test_only_the_bus_is_polled(fake, events, listen, supervise, run):
    fake.refuse()
    supervisor = supervise(listen(FakeFeed("cron_trigger")))
    events.expect(FAILED)
    run(60, supervisor)
    assert not fake.asked and supervisor.mode == POLLING
