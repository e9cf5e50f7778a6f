"""The listeners of a cluster see that they hear, by few notifications: hours of it, in simulated time."""

import random

import pytest

from bus_alt_connection import connection, supervisor
from bus_alt_connection.catchup import Backlog
from bus_alt_connection.log import UNHEARD
from bus_alt_connection.payload import HEARTBEAT_CHANNEL
from tests.unit.fakes import live


@pytest.fixture
def cluster(fake, watch):
    """Return a function that starts so many listeners, ``apart`` seconds from each other.

    ``heard[session]``: when it received something.
    """
    heard = {}
    fake.on_notify = lambda session: heard.setdefault(session, []).append(fake.now)

    def cluster(number, apart=0.0):
        members = []
        for _ in range(number):
            members.append(watch())
            live(fake, apart, members)
        return members

    cluster.heard = heard
    return cluster


@pytest.fixture
def traffic(fake):
    """Return a function that sends on the bus at random intervals of ``seconds`` at most, whenever it is called."""

    def traffic(seconds):
        due = [fake.now]

        def send():
            if fake.now >= due[0]:
                due[0] = fake.now + random.uniform(0, seconds)
                fake.write("x1", '"%f"' % fake.now)

        return send

    return traffic


def known_by(interval):
    """Return the seconds, of simulated time, after which a listener that hears nothing is known to be deaf."""
    return interval - min(supervisor.CHECK_TIMEOUT, interval / 3) - connection.PROBE_TIMEOUT


def test_of_many_listeners_one_sends_for_all_once_a_minute(fake, cluster):
    members = cluster(12, apart=5)
    assert len(fake.sent) <= 14
    fake.sent.clear()
    live(fake, 1200, members, step=10)
    # Not none either: each has to hear something once a minute.
    assert 19 <= len(fake.sent) <= 40
    for member in members:
        session = member.listener.session
        assert {HEARTBEAT_CHANNEL, "imbus"} <= session.channels
        moments = [*cluster.heard[session], fake.now]
        assert max(after - before for before, after in zip(moments, moments[1:])) <= 60
        # Odoo does not see any of it.
        assert member.feed.all() == []


def test_the_first_check_of_a_listener_wakes_no_other(fake, cluster):
    live(fake, 5, cluster(5))
    assert [len(times) for times in cluster.heard.values()] == [1] * 5


@pytest.mark.parametrize("every", [5, 40])
def test_while_others_send_none_sends_more_than_its_first_token_and_each_looks_once_a_minute(
    fake, cluster, traffic, monkeypatch, every
):
    marks, heard_up_to = [], Backlog.heard_up_to
    monkeypatch.setattr(Backlog, "heard_up_to", lambda *args: marks.append(args) or heard_up_to(*args))
    members = cluster(5, apart=7)
    live(fake, 1800, members, meanwhile=traffic(every))
    assert len(fake.sent) == 5
    # A look is a login at the pooler. After it the listener knows up to where it has heard everything.
    assert 30 <= fake.logins.count("postgres") / 5 <= 41
    assert len(marks) / 5 >= 27


@pytest.mark.parametrize("interval", [3, 60])
@pytest.mark.parametrize("others", [0, 3])
def test_a_listener_that_goes_deaf_is_found_within_the_interval(fake, cluster, traffic, options, interval, others):
    options.check_interval = interval
    members = cluster(others + 1)
    send = traffic(interval / 5) if others else lambda: None
    for _ in range(8):
        live(fake, random.uniform(1, 4) * interval, members, step=0.5, meanwhile=send)
        session = members[-1].listener.session
        session.deaf = True
        live(fake, known_by(interval), members, step=0.5, meanwhile=send)
        event = members[-1].events.wait_for(UNHEARD)
        assert event.session is session and "is silent" in event.reason


@pytest.mark.parametrize(
    "fault, reason",
    [
        ({"sees_started": 5}, "is another server than the one that Odoo sends to"),
        ({"sees_database": "other"}, "it listens on database postgres, but Odoo sends on other"),
    ],
)
def test_a_sender_that_goes_elsewhere_is_found_within_the_interval_though_others_are_heard(
    fake, cluster, traffic, fault, reason
):
    members = cluster(3, apart=7)
    live(fake, 300, members, meanwhile=traffic(5))
    vars(fake).update(fault)
    live(fake, known_by(60), members, meanwhile=traffic(5))
    assert all(reason in member.events.wait_for(UNHEARD).reason for member in members)


def test_a_sender_that_seems_to_go_elsewhere_but_is_heard_is_left_alone(fake, cluster, traffic):
    """As when the server has told the time of its start in another way."""
    members = cluster(3)
    live(fake, 120, members, meanwhile=traffic(10))
    sessions = [member.listener.session for member in members]
    for session in sessions:
        session.facts = session.facts._replace(started=5)
    fake.sent.clear()
    live(fake, 120, members, meanwhile=traffic(10))
    assert len(fake.sent) >= 6 and [member.listener.session for member in members] == sessions


def test_nothing_is_taken_for_heard_that_was_sent_after_a_check_or_that_a_feed_had_no_room_for(watched, fake):
    marks, heard_up_to, opening = [], watched.backlog.heard_up_to, fake.opening
    watched.backlog.heard_up_to = lambda moment, now: marks.append(moment.snapshot) or heard_up_to(moment, now)
    sent = []

    def opening_meanwhile(database):
        if database == "postgres":
            # So that no token is needed: what was sent before the previous check has been heard.
            watched.feed.full = len(sent) == 2
            fake.write("x1", '"%d"' % len(sent))
            fake.settle()
            watched.feed.full = False
            sent.append(fake._snapshot())
        return opening(database)

    watched._opening = opening_meanwhile
    while len(sent) < 3:
        watched.live(1)
    assert len(marks) == 2 and marks[1:] == sent[:1]
    watched.live(10)
    assert any('"2"' in payload for payload in watched.feed.bus())
