"""The supervisor finds out whether the listener hears, why it does not, and delivers what it missed: by rounds."""

import pytest

from bus_alt_connection import log
from bus_alt_connection.log import CONFIRMED, UNHEARD
from bus_alt_connection.supervisor import DEAF as DEAF_MODE
from bus_alt_connection.supervisor import LISTENING, POLLING, _Attempt
from tests.unit.fakes import FakeFeed, connected

# Checks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval, at_most", [(0.5, 12), (4, 8), (0, 1)])
def test_checks_are_as_far_apart_as_was_set(watch, options, interval, at_most):
    options.check_interval = interval
    watched = watch()
    watched.live(10)
    assert 1 <= len(watched.fake.sent) <= at_most


@pytest.mark.parametrize(
    "is_pooler, reason",
    [
        (False, "db-01:5432 accepts connections, but no notification arrives"),
        (True, "is a pooler that does not keep LISTEN"),
    ],
)
def test_a_check_that_is_not_heard_replaces_the_session_and_says_why(watch, fake, is_pooler, reason):
    fake.deaf_pooler = is_pooler
    if not is_pooler:
        fake.swallow()
    watched = watch()
    session = watched.listener.session
    watched.live(1)
    assert reason in watched.events.expect(UNHEARD).reason
    connected(watched.listener, after=session)
    # A session that has ended meanwhile is not examined: on a path that cuts each, that would be two connections more.
    session.explaining = None
    watched._give_up(session, None)


def test_behind_a_pooler_a_second_token_has_to_arrive(watch, fake):
    fake.pooled = True
    watched = watch()
    # The first may have been luck.
    fake.on_notify = lambda session: fake.swallow()
    watched.live(10)
    assert "is a pooler" in watched.events.expect(UNHEARD).reason
    fake.on_notify = lambda session: None
    fake.forward()
    watched.live(30)
    assert watched.events.wait_for(CONFIRMED).session.confirmed == {"imbus"} and watched.mode == LISTENING
    fake.notify("imbus", '["a"]')
    assert watched.feed.get() == ("imbus", '["a"]')


@pytest.mark.parametrize(
    "pooled, leader_pid, elsewhere, now, needed",
    [
        (False, None, {}, 1040.0, False),
        # PgDog before 0.1.52 takes channels of the same name in two databases for one. A leader checks that.
        (True, None, {}, 1040.0, True),
        (True, 7, {}, 1040.0, False),
        (False, None, {"started": 5}, 1040.0, True),
        # Another process would have sent a heartbeat by now.
        (False, None, {}, 1050.0, True),
    ],
)
def test_only_sometimes_a_token_of_this_process_is_needed_as_proof(watched, pooled, leader_pid, elsewhere, now, needed):
    session = watched.listener.session
    session.facts = session.facts._replace(pooled=pooled)
    session.leader_pid = leader_pid
    session.heard_at, watched._span = 1000.0, 50.0
    assert watched._needs_token(session, session.facts._replace(**elsewhere), now) is needed


def test_a_check_shows_what_was_heard_if_no_feed_dropped_any_of_it(watched):
    """A notification of another process shows it only for what was sent before the previous check."""
    heard = []
    watched.backlog.heard_up_to = lambda moment, _now: heard.append(moment)

    def succeed(moment, sent_at):
        attempt = _Attempt(moment, sent_at, False)
        watched._note_success(watched.listener.session, frozenset(["imbus"]), attempt, watched.fake.now)

    succeed("first", sent_at=1.0)
    succeed("second", sent_at=None)
    succeed("third", sent_at=None)
    assert heard == ["first", "first", "second"]
    watched.listener.dropped += 1
    succeed("fourth", sent_at=2.0)
    assert len(heard) == 3


def test_a_listener_is_left_alone_while_checks_can_not_be_sent_and_health_says_so(watched, logged):
    session = watched.listener.session
    assert watched.status()["problem"] is None
    watched.fake.away.add("pooler")
    watched.live(300)
    assert watched.listener.session is session and watched.mode == LISTENING
    assert len(logged("can't check the listener")) == 1
    assert "notifications can't be sent" in watched.status()["problem"]
    watched.fake.away.clear()
    watched.live(5)
    assert watched.status()["problem"] is None
    watched.fake.now += 300
    assert "older than the check interval" in watched.status()["problem"]


def test_a_long_notification_queue_and_who_may_be_the_cause_are_logged_once_a_minute(watched, logged):
    watched.fake.queue_usage = 0.5
    watched.live(300)
    assert not logged("notification queue")
    watched.fake.queue_usage, watched.fake.transactions = 0.63, [(42, "a\nb", 3600.2)]
    watched.live(50)
    (line,) = logged("PostgreSQL's notification queue is 63% full")
    assert line.endswith("The oldest transaction: backend pid 42, application 'a\\nb', for 3600 s")
    watched.fake.transactions = []
    log._last.clear()
    watched.live(60)
    assert logged("notification queue")[-1].endswith("not visible to this role")


def test_a_bug_in_a_round_is_logged_once_a_minute_and_the_rest_goes_on(watched, logged):
    def bug(*_arguments):
        raise KeyError("a bug")

    watched.listener.wait_for_token = bug
    watched.live(50)
    watched.backlog.add_pending(["x1"], watched.fake.now)
    watched.fake.asked.clear()
    watched.live(70)
    assert len(logged("internal error")) == 1 and watched.fake.asked


# Polling, and the modes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "channel, away, poll_interval, mode, problem",
    [
        ("imbus", (), 5, POLLING, "late"),
        ("imbus", ["pooler"], 5, DEAF_MODE, "do not arrive"),
        ("imbus", (), 0, DEAF_MODE, "do not arrive"),
        # Only the bus is polled.
        ("cron_trigger", (), 5, POLLING, "late"),
    ],
)
def test_the_mode_says_how_notifications_arrive(watch, fake, options, channel, away, poll_interval, mode, problem):
    fake.refuse()
    fake.away.update(away)
    options.poll_interval = poll_interval
    watched = watch(FakeFeed(channel), connects=False)
    watched.live(60)
    assert watched.mode == watched.status()["mode"] == mode
    assert problem in watched.status()["problem"]
    assert bool(fake.asked) is (mode == POLLING and channel == "imbus")
