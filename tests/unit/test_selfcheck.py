"""Many listeners of a cluster see that they hear, by few notifications: hours of it, in simulated time."""

import heapq
import random
import uuid

import pytest

from bus_alt_connection import catchup, connection, supervisor
from bus_alt_connection.catchup import Backlog, Databases
from bus_alt_connection.listener import Listener
from bus_alt_connection.log import UNHEARD
from bus_alt_connection.payload import HEARTBEAT_CHANNEL
from tests.unit.fakes import Events, FakeFeed, TimelessSupervisor


class Inline(Listener):
    """A listener without a thread, which looks at its session whenever there is something."""

    def __init__(self, fake, feed):
        super().__init__("postgres", fake.connect, lambda: False, Events(), 19)
        self.add(feed)
        session = fake.connect()
        session.check_channel = uuid.uuid4().hex
        self._listen(session)
        self.session, self.lives, self.fault = session, 1, None

    def wake(self):
        if self.session is not None:
            self._receive(self.session)

    def replace(self, session, kind, reason):
        self.fault = kind, reason
        self.end()

    def end(self):
        session, self.session = self.session, None
        if session is not None:
            session.close()
            self._waker.close()
            self.changes.close()


class Member(TimelessSupervisor):
    """A supervisor with its listener and feed.

    :ivar heard_at: when its session received something
    :ivar heard: what its feed was given
    :ivar marks: pairs of when it took everything sent so far for heard, and of what it had not heard by then
    """

    def __init__(self, fake, options):
        self.fake, self.feed, self.began = fake, FakeFeed("imbus"), fake.now
        self.heard_at, self.heard, self.marks = [], set(), []
        self._put, self.feed.put = self.feed.put, self._remember
        backlog = Backlog(fake.opening)
        self._heard_up_to, backlog.heard_up_to = backlog.heard_up_to, self._note_mark
        super().__init__(Inline(fake, self.feed), fake.opening, Databases(["x"]), backlog, options)

    @property
    def fault(self):
        return self.listener.fault

    def _remember(self, notifications):
        # What there is no room for is looked up later.
        self.heard.update(*(each.payload[1:-1].split(",") for each in notifications))
        return self._put(notifications)

    def _note_mark(self, moment, now):
        sent_before = int(moment.snapshot.split(":")[1])
        sent = {channel for xid, at, channel in self.fake.rows["x"] if xid < sent_before and at >= self.began}
        # An exception would not get past the supervisor.
        self.marks.append((now, sent - self.heard))
        self._heard_up_to(moment, now)


class Cluster:
    """Listeners with their supervisors, and what else happens at some time."""

    def __init__(self, fake, options):
        self.fake, self.options = fake, options
        self.members, self._due = [], []
        fake.on_notify = self._give
        fake.rows["x"] = []

    def add(self, number=1, within=0.0):
        """Add listeners that start at random within so many seconds; return the last one."""
        for _ in range(number):
            member = Member(self.fake, self.options)
            self.members.append(member)
            self._at(self.fake.now + random.uniform(0, within), member.round)
        return member

    def send_every(self, seconds):
        """Send at random intervals of ``seconds`` at most, from now on."""

        def send(now):
            self.fake.write("x", '"%f"' % now)
            return now + random.uniform(0, seconds)

        self._at(self.fake.now, send)

    def run(self, seconds):
        end = self.fake.now + seconds
        while self._due and self._due[0][0] < end:
            due, _order, step = heapq.heappop(self._due)
            self.fake.now = max(due, self.fake.now)
            following = step(self.fake.now)
            if not getattr(getattr(step, "__self__", None), "fault", None):
                self._at(max(following, due + 0.001), step)
        self.fake.now = end

    def faults(self):
        return [member.fault for member in self.members]

    def _at(self, due, step):
        heapq.heappush(self._due, (due, random.random(), step))

    def _give(self, session):
        (member,) = [member for member in self.members if member.listener.session is session]
        member.heard_at.append(self.fake.now)
        member.listener._receive(session)


@pytest.fixture
def cluster(fake, options, clock, monkeypatch):
    # All at once, since time stands still within a round.
    monkeypatch.setattr(catchup, "PORTION", 10**6)
    cluster = Cluster(fake, options)
    yield cluster
    for member in cluster.members:
        member.listener.end()
        # Nobody takes for heard what the feed did not receive.
        assert member.marks and not any(missed for _at, missed in member.marks)


def known_by(interval):
    """Return the seconds, of simulated time, after which a listener that hears nothing is known to be deaf."""
    return interval - min(supervisor.CHECK_TIMEOUT, interval / 3) - connection.PROBE_TIMEOUT


def test_100_listeners_of_an_idle_cluster_send_one_or_two_notifications_a_minute(fake, cluster):
    cluster.add(100, within=60)
    cluster.run(1200)
    # Not none either: each has to hear something once a minute.
    assert 100 + 19 <= len(fake.sent) <= 100 + 40
    for member in cluster.members:
        moments = [*member.heard_at, fake.now]
        assert max(after - before for before, after in zip(moments, moments[1:])) <= 60
        # Odoo does not see any of it.
        assert member.feed.all() == []
    assert not any(cluster.faults())


@pytest.mark.parametrize("every", [5, 40])
def test_on_a_busy_cluster_each_listener_sends_once_and_looks_once_a_minute(fake, cluster, every):
    cluster.add(10, within=60)
    cluster.send_every(every)
    cluster.run(3600)
    assert len(fake.sent) == 10
    # A look is a login at the pooler.
    assert 60 <= fake.logins.count("postgres") / 10 <= 80
    for member in cluster.members:
        moments = [at for at, _missed in member.marks]
        assert max(after - before for before, after in zip(moments, [*moments[1:], fake.now])) <= 120


def test_the_first_check_wakes_nobody_else_and_a_heartbeat_is_for_all(fake, cluster):
    cluster.add(10)
    cluster.run(5)
    assert all(len(member.heard_at) == 1 for member in cluster.members)
    fake.sent.clear()
    cluster.run(60)
    assert all(member.heard_at[1] == fake.sent[0] for member in cluster.members)
    assert all({HEARTBEAT_CHANNEL, "imbus"} <= session.channels for session in fake.sessions)


@pytest.mark.parametrize("interval", [3, 60])
@pytest.mark.parametrize("others", [0, 5])
def test_a_listener_that_goes_deaf_is_found_within_the_interval(cluster, options, interval, others):
    options.check_interval = interval
    if others:
        cluster.add(others, within=interval)
        cluster.send_every(interval / 5)
    for _ in range(10):
        member = cluster.add()
        cluster.run(random.uniform(1, 4) * interval)
        assert not member.fault
        member.listener.session.deaf = True
        cluster.run(known_by(interval))
        assert member.fault[0] == UNHEARD and "is silent" in member.fault[1]
    assert not any(cluster.faults()[:others])


@pytest.mark.parametrize(
    "fault, reason",
    [
        ({"sees_started": 5}, "is another server than the one that Odoo sends to"),
        ({"sees_database": "other"}, "it listens on database postgres, but Odoo sends on other"),
    ],
)
def test_a_sender_that_goes_elsewhere_is_found_within_the_interval_though_others_are_heard(
    fake, cluster, fault, reason
):
    cluster.add(5, within=60)
    cluster.send_every(5)
    cluster.run(300)
    vars(fake).update(fault)
    cluster.run(known_by(60))
    assert all(kind == UNHEARD and reason in text for kind, text in cluster.faults())


def test_a_sender_that_seems_to_go_elsewhere_but_is_heard_is_left_alone(fake, cluster):
    """As when the server has told the time of its start in another way."""
    cluster.add(3)
    cluster.send_every(10)
    cluster.run(120)
    fake.sent.clear()
    for session in fake.sessions:
        session.facts = session.facts._replace(started=5)
    cluster.run(120)
    assert len(fake.sent) >= 6 and not any(cluster.faults())


def test_nothing_is_taken_for_heard_that_a_feed_had_no_room_for_during_a_check(fake, cluster):
    """Odoo's loop may get stuck between the steps of a round."""
    member = cluster.add()
    cluster.send_every(10)
    cluster.run(300)
    opening, marks = fake.opening, len(member.marks)

    def opening_meanwhile(database):
        member._opening, member.feed.full = opening, True
        fake.write("x", '"dropped"')
        member.feed.full = False
        return opening(database)

    member._opening = opening_meanwhile
    while member._opening is not opening:
        cluster.run(0.01)
    assert len(member.marks) == marks
    cluster.run(120)
    assert any('"dropped"' in payload for _channel, payload in member.feed.all()) and len(member.marks) > marks
