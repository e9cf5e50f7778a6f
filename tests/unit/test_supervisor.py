"""The supervisor finds out whether the listener hears, why it does not, and delivers what it missed: by rounds."""

import threading

import pytest

from bus_alt_connection import catchup, log, tasks
from bus_alt_connection import supervisor as supervisor_module
from bus_alt_connection.cursor import FEED_SIZE, Feed
from bus_alt_connection.log import CONFIRMED, LOST, UNHEARD
from bus_alt_connection.supervisor import DEAF as DEAF_MODE
from bus_alt_connection.supervisor import LISTENING, POLLING, Supervisor
from tests.unit.fakes import FakeFeed, connected

# What was missed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("away", [set(), {"postgres"}], ids=["", "checks can't be sent"])
def test_what_was_sent_in_an_outage_is_delivered_once_it_is_over_and_once_only(watched, away):
    watched.fake.away = away
    watched.miss('"missed"', after=100)
    watched.live(5)
    assert watched.feed.bus() == ['["missed"]']
    watched.fake.away = set()
    watched.live(300)
    assert watched.feed.bus() == [] and watched.mode == LISTENING


def test_what_a_database_missed_is_delivered_once_it_answers_though_checks_pass_meanwhile(watched):
    watched.fake.away.add("x1")
    watched.miss('"missed"', after=100)
    watched.fake.logins.clear()
    watched.live(300)
    assert watched.feed.bus() == [] and watched.mode == LISTENING
    assert watched.fake.logins.count("x1") <= 300 / catchup.LONGEST_DELAY + 6
    watched.fake.away.clear()
    watched.live(120)
    assert watched.feed.bus() == ['["missed"]']


@pytest.mark.parametrize("when", ["before the message", "as it is delivered"])
def test_what_the_loop_of_the_bus_missed_because_it_ended_is_delivered_to_the_next_loop(watched, watch, when):
    listener, deliver = watched.listener, watched.listener.deliver
    if when == "before the message":
        listener.remove(watched.feed)
        watched.fake.write("x1", '"missed"')
    else:
        watched.miss('"missed"', after=100)
        listener.deliver = lambda notifications: listener.remove(watched.feed) or deliver(notifications)
        watched.round(watched.fake.now)
    watched.fake.now += 300
    following = watch(backlog=watched.backlog)
    following.live(10)
    assert watched.feed.bus() == [] and following.feed.bus() == ['["missed"]']


def test_what_is_sent_while_only_cron_listens_is_delivered_to_the_bus_afterwards(settled):
    watched = settled(FakeFeed("imbus"), FakeFeed("cron_trigger"))
    bus, listener = watched.feed, watched.listener
    # For the time of one round, or of several checks.
    for seconds in (0, 300):
        listener.remove(bus)
        listener.wait(lambda: "imbus" not in listener.session.channels, 5)
        watched.live(seconds / 30)
        watched.fake.write("x1", '"missed"')
        watched.fake.now += 100
        watched.live(seconds)
        listener.add(bus)
        listener.listen(bus, frozenset(["imbus"]))
        listener.wait_for_listen(bus, 5)
        watched.live(10)
        assert '["missed"]' in bus.bus()


def test_what_a_full_feed_had_no_room_for_is_looked_up_at_most_every_few_seconds(watched):
    listener, full = watched.listener, Feed()
    full.channels = frozenset(["imbus"])
    listener.add(full)
    for number in range(FEED_SIZE + 5):
        watched.fake.write("x1", '"%d"' % number)
    assert listener.wait(lambda: listener.counters["notifications_dropped"] == 5, 5)
    assert listener.counters["notifications_received"] == FEED_SIZE + 5
    watched.fake.logins.clear()
    watched.live(60)
    assert 2 <= watched.fake.logins.count("x1") <= 60 / supervisor_module.DROPPED_INTERVAL + 1
    full.poll()
    del full.notifies[:]
    watched.live(120)
    full.poll()
    assert '"%d"' % (FEED_SIZE + 4) in "".join(each.payload for each in full.notifies)
    assert watched.status()["counters"]["notifications_caught_up"] >= 5
    full.close()


def test_a_cron_that_is_busy_for_long_causes_no_look_ups(settled):
    busy = FakeFeed("cron_trigger")
    watched = settled(FakeFeed("imbus"), busy)
    watched.fake.logins.clear()
    busy.full = True
    for _ in range(20):
        watched.fake.notify("cron_trigger", "x")
        watched.fake.settle()
    watched.live(20)
    assert len(watched.fake.logins) <= 2


def test_cron_is_woken_for_all_databases_after_an_outage_but_not_at_the_start(watch):
    watched = watch(FakeFeed("cron_trigger"), databases=["x", "y"])
    watched.live(1)
    assert watched.feed.all() == []
    watched.lose()
    watched.come_back()
    watched.live(10)
    assert sorted(watched.feed.all()) == [("cron_trigger", name) for name in ("postgres", "x", "y")]


# Checks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval, at_most", [(0.5, 12), (4, 8), (0, 1)])
def test_checks_are_as_far_apart_as_was_set(watch, options, interval, at_most):
    options.check_interval = interval
    watched = watch()
    watched.live(10)
    assert 1 <= len(watched.fake.sent) <= at_most


@pytest.mark.parametrize(
    "fault, reason",
    [
        ({}, "the path to db-01:5432 is silent, nothing comes through"),
        ({"deaf_pooler": True}, "is a pooler that does not keep the connection for us"),
        ({"started": 5}, "is another server than the one that Odoo sends to"),
    ],
)
def test_a_check_that_is_not_heard_replaces_the_session_and_says_why(watch, fake, fault, reason):
    vars(fake).update(fault)
    if "deaf_pooler" not in fault:
        fake.swallow()
    watched = watch()
    session = watched.listener.session
    watched.live(1)
    assert reason in watched.events.expect(UNHEARD).reason
    connected(watched.listener, after=session)


def test_a_check_that_is_not_heard_is_noticed_while_a_look_up_is_under_way(watched):
    watched._tasks.start(tasks.sleep(300))
    watched.fake.swallow()
    watched.live(60)
    assert "is silent" in watched.events.expect(UNHEARD).reason


def test_a_session_that_is_lost_while_it_is_checked_is_not_examined(watched):
    """That would be two more connections on a path that cuts each."""
    listener, session = watched.listener, watched.listener.session
    wait_for_token, examined = listener.wait_for_token, []

    def wait_after_a_cut(*args):
        watched.fake.cut()
        watched.events.wait_for(LOST)
        return wait_for_token(*args)

    session.explaining = lambda *_args: examined.append(session)
    listener.wait_for_token = wait_after_a_cut
    watched.round(watched.fake.now + 60)
    assert (examined, session.fault) == ([], None)


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


@pytest.mark.parametrize("pooled, leader_pid, needed", [(False, None, False), (True, None, True), (True, 7, False)])
def test_behind_a_pooler_only_a_token_of_this_process_is_proof(watched, pooled, leader_pid, needed):
    """PgDog before 0.1.52 takes channels of the same name in two databases for one."""
    session = watched.listener.session
    session.facts = session.facts._replace(pooled=pooled)
    session.leader_pid = leader_pid
    session.heard_at, watched._span = 1000.0, 50.0
    assert watched._needs_token(session, session.facts, 1040.0) is needed


def test_a_listener_is_left_alone_while_checks_can_not_be_sent_and_health_says_so(watched, logged):
    session = watched.listener.session
    assert watched.status()["problem"] is None
    watched.fake.away.add("pooler")
    watched.live(300)
    assert watched.listener.session is session and watched.mode == LISTENING
    assert len(logged("can't tell whether the listener")) == 1
    assert "nothing can be sent" in watched.status()["problem"]
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
    (line,) = logged("notification queue of PostgreSQL is full to 63%")
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


def test_it_runs_until_its_listener_ends(fake, events, listen, options):
    feed = FakeFeed("imbus")
    databases = catchup.Databases(["x1"])
    supervisor = Supervisor(listen(feed), fake.opening, databases, catchup.Backlog(fake.opening), options)
    thread = threading.Thread(target=supervisor.run, daemon=True)
    thread.start()
    events.expect(CONFIRMED)
    supervisor.listener.remove(feed)
    thread.join(5)
    assert not thread.is_alive()


# Polling, and the modes -----------------------------------------------------------------------------------------------


def test_in_an_outage_it_polls_what_is_new_until_the_listener_has_taken_over(watched, logged):
    watched.lose()
    watched.live(60)
    for number in range(3):
        watched.fake.write("x1", '"%d"' % number)
        watched.live(30)
        assert watched.feed.bus() == ['["%d"]' % number]
    assert watched.mode == POLLING
    watched.come_back()
    watched.live(10)
    assert watched.mode == LISTENING
    assert len(logged("looking into bus_bus every 5 s")) == len(logged("has taken over from polling")) == 1


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


def test_all_is_well_again_though_the_pooler_was_away_as_the_listener_came_back(watched):
    watched.fake.away.add("pooler")
    watched.lose()
    watched.come_back(after=100)
    watched.live(18)
    assert watched.mode == DEAF_MODE
    watched.fake.away.clear()
    watched.live(10)
    assert watched.mode == LISTENING
    assert (watched.status()["confirmed"], watched.status()["reconnects"]) == (True, 1)
