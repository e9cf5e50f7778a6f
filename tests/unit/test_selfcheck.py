"""Many listeners of a cluster see that they hear, by few notifications: hours of it, in a time that is simulated."""

import heapq
import random
import uuid
from types import SimpleNamespace

import pytest

from bus_alt_connection import catchup, connection
from bus_alt_connection import listener as listener_module
from bus_alt_connection import supervisor as supervisor_module
from bus_alt_connection.catchup import Backlog, Databases
from bus_alt_connection.listener import Listener
from bus_alt_connection.log import UNHEARD
from bus_alt_connection.payload import HEARTBEAT_CHANNEL
from tests.unit.fakes import Events, FakeFeed, TimelessSupervisor

HOUR = 3600.0


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


class Cluster:
    """Listeners with their supervisors, and what else happens at some time.

    :ivar heard: session -> when it heard something
    """

    def __init__(self, fake, options):
        self.fake, self.options = fake, options
        self.supervisors, self.heard = [], {}
        self._feeds, self._by_session, self._due = [], {}, []
        fake.on_notify = self._give
        fake.rows["x"] = []

    def add(self, after=0.0):
        """Add a listener that starts so many seconds from now; return its supervisor."""
        feed = FakeFeed("imbus")
        listener = Inline(self.fake, feed)
        backlog = Backlog(self.fake.opening)
        supervisor = TimelessSupervisor(listener, self.fake.opening, Databases(["x"]), backlog, self.options)
        self._by_session[listener.session] = listener
        self.heard[listener.session] = []
        # Weakly held there.
        self._feeds.append(feed)
        self.supervisors.append(supervisor)
        self.at(self.fake.now + after, supervisor.round)
        return supervisor

    def at(self, due, step):
        """Have ``step(now)`` called; it returns when to be called again."""
        heapq.heappush(self._due, (due, random.random(), step))

    def run(self, seconds):
        end = self.fake.now + seconds
        while self._due and self._due[0][0] < end:
            due, _order, step = heapq.heappop(self._due)
            self.fake.now = max(due, self.fake.now)
            following = step(self.fake.now)
            listener = getattr(getattr(step, "__self__", None), "listener", None)
            if listener is None or listener.fault is None:
                self.at(max(following, due + 0.001), step)
        self.fake.now = end

    def every(self, seconds, do):
        """Do so every so often, from now on."""

        def step(now):
            do()
            return now + seconds() if callable(seconds) else now + seconds

        self.at(self.fake.now, step)

    def close(self):
        for listener in self._by_session.values():
            listener.end()

    def _give(self, session):
        self.heard[session].append(self.fake.now)
        self._by_session[session]._receive(session)


@pytest.fixture
def cluster(fake, options, monkeypatch):
    for module in (listener_module, supervisor_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: fake.now))
    # All at once, since time stands still within a round.
    monkeypatch.setattr(catchup, "PORTION", 10**6)
    cluster = Cluster(fake, options)
    yield cluster
    cluster.close()


@pytest.fixture
def hasty(monkeypatch):
    """What does not come is waited for shortly, as time stands still meanwhile; return how long it is in fact."""
    patience = supervisor_module.CHECK_TIMEOUT
    hears = Listener.wait_for_token
    monkeypatch.setattr(
        Listener, "wait_for_token", lambda self, session, timeout, wait: hears(self, session, 0.001, wait)
    )
    return lambda interval: min(patience, interval / 3) + connection.PROBE_TIMEOUT


def traffic(cluster):
    number = iter(range(10**9))
    return lambda: cluster.fake.write("x", '"%d"' % next(number))


# How many notifications -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("within", [0, 60], ids=["at once", "one after the other"])
def test_100_listeners_of_an_idle_cluster_send_at_most_200_in_an_hour(fake, cluster, within):
    for _ in range(100):
        cluster.add(random.uniform(0, within))
    cluster.run(HOUR)
    # Not none either: each has to hear something once a minute.
    assert 100 + 59 <= len(fake.sent) <= 200
    for times in cluster.heard.values():
        moments = [*times, fake.now]
        assert max(after - before for before, after in zip(moments, moments[1:])) <= 60
    assert not any(one.listener.fault for one in cluster.supervisors)
    # Odoo does not see any of it.
    assert not any(feed.all() for feed in cluster._feeds)


@pytest.mark.parametrize("every", [1, 20, 45])
def test_on_a_busy_cluster_none_sends_more_than_its_first(fake, cluster, every):
    for _ in range(5):
        cluster.add(random.uniform(0, 60))
    cluster.every(every, traffic(cluster))
    cluster.run(HOUR)
    assert len(fake.sent) == 5


@pytest.mark.parametrize("within", [None, 60, 5])
def test_each_looks_about_once_a_minute_however_often_others_send(fake, cluster, within):
    """A look is a login at the pooler."""
    for _ in range(20):
        cluster.add(random.uniform(0, 60))
    if within:
        cluster.every(lambda: random.uniform(0, within), traffic(cluster))
    cluster.run(HOUR)
    assert 60 <= fake.logins.count("postgres") / 20 <= 80


def test_one_on_its_own_sends_about_once_a_minute(fake, cluster):
    cluster.add()
    cluster.run(HOUR)
    assert 60 <= len(fake.sent) <= 80


def test_the_first_check_wakes_nobody_else(fake, cluster):
    for _ in range(10):
        cluster.add()
    cluster.run(5)
    before = {session: len(times) for session, times in cluster.heard.items()}
    cluster.add()
    cluster.run(1)
    assert {session: len(cluster.heard[session]) for session in before} == before
    assert all(len(times) == 1 for times in cluster.heard.values())


def test_a_heartbeat_is_for_all(fake, cluster):
    for _ in range(10):
        cluster.add()
    cluster.run(5)
    fake.sent.clear()
    cluster.run(60)
    # One speaks, after nine tenths of the interval or more; all of them hear.
    (sent,) = fake.sent[:1]
    assert all(times[1] == sent for times in cluster.heard.values())
    assert all({HEARTBEAT_CHANNEL, "imbus"} <= session.channels for session in cluster.heard)


# What is found out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [3, 60, 600])
@pytest.mark.parametrize("others", ["none", "idle", "busy"])
def test_a_listener_that_goes_deaf_is_found_within_the_interval(fake, cluster, options, hasty, interval, others):
    options.check_interval = interval
    for _ in range(0 if others == "none" else 5):
        cluster.add(random.uniform(0, interval))
    if others == "busy":
        cluster.every(lambda: random.uniform(0, interval / 10), traffic(cluster))
    for _ in range(20):
        listener = cluster.add().listener
        cluster.run(random.uniform(1, 4) * interval)
        assert not listener.fault
        listener.session.deaf = True
        cluster.run(interval - hasty(interval))
        assert listener.fault and listener.fault[0] == UNHEARD
        assert "is silent" in listener.fault[1]
    assert not any(one.listener.fault for one in cluster.supervisors[:-20])


@pytest.mark.parametrize("others", ["idle", "busy"])
@pytest.mark.parametrize(
    "fault, reason",
    [
        ({"sees_started": 5}, "is another server than the one that Odoo sends to"),
        ({"sees_database": "other"}, "it listens on database postgres, but Odoo sends on other"),
    ],
)
def test_a_sender_that_goes_elsewhere_is_found_within_the_interval(fake, cluster, hasty, others, fault, reason):
    """What Odoo sends is not heard any more, though others still send."""
    for _ in range(10):
        cluster.add(random.uniform(0, 60))
    if others == "busy":
        cluster.every(lambda: random.uniform(0, 5), traffic(cluster))
    cluster.run(300)
    vars(fake).update(fault)
    cluster.run(60 - hasty(60))
    for supervisor in cluster.supervisors:
        assert supervisor.listener.fault[0] == UNHEARD
        assert reason in supervisor.listener.fault[1]


def test_a_sender_that_goes_elsewhere_and_still_is_heard_is_left_alone(fake, cluster):
    """As when the server has told the time of its start in another way: what arrives, counts."""
    for _ in range(3):
        cluster.add()
    cluster.every(5, traffic(cluster))
    cluster.run(120)
    fake.sent.clear()
    for supervisor in cluster.supervisors:
        supervisor.listener.session.facts = supervisor.listener.session.facts._replace(started=5)
    cluster.run(120)
    assert len(fake.sent) >= 6
    assert not any(one.listener.fault for one in cluster.supervisors)


# What is known to have been heard -------------------------------------------------------------------------------------


@pytest.fixture
def marks(fake, cluster, monkeypatch):
    """The marks that are made, by backlog; see that none is ahead of what its listener had heard by then."""
    made, ahead, heard_up_to = {}, [], Backlog.heard_up_to

    def spy(backlog, moment, now):
        (supervisor,) = [one for one in cluster.supervisors if one._backlog is backlog]
        heard = cluster._feeds[cluster.supervisors.index(supervisor)].seen
        highest = int(moment.snapshot.split(":")[1])
        sent = {channel for xid, _at, channel in fake.rows["x"] if xid < highest}
        # A supervisor would go on after an exception.
        ahead.extend(sent - heard)
        made.setdefault(backlog, []).append((now, highest))
        return heard_up_to(backlog, moment, now)

    class Remembering(FakeFeed):
        def __init__(self, *channels):
            super().__init__(*channels)
            self.seen = set()

        def put(self, notifications):
            self.seen |= {one.payload[1:-1] for one in notifications}
            return super().put(notifications)

    monkeypatch.setattr(Backlog, "heard_up_to", spy)
    monkeypatch.setattr("tests.unit.test_selfcheck.FakeFeed", Remembering)
    yield made
    assert made and not ahead


def test_on_a_busy_cluster_what_was_heard_is_known_without_sending(fake, cluster, marks):
    for _ in range(10):
        cluster.add(random.uniform(0, 60))
    cluster.every(lambda: random.uniform(0, 20), traffic(cluster))
    cluster.run(HOUR)
    assert len(fake.sent) == 10
    assert len(marks) == 10
    for one in marks.values():
        # About once a minute, and each further on; none is older than two checks.
        assert len(set(one)) >= 50 and one == sorted(one)
        moments = [now for now, _highest in one]
        assert max(after - before for before, after in zip(moments, [*moments[1:], fake.now])) <= 120
        assert one[-1][1] > fake._xid - 40


def test_on_an_idle_cluster_it_is_known_as_well(fake, cluster, marks):
    for _ in range(10):
        cluster.add()
    cluster.run(HOUR)
    for one in marks.values():
        assert len(one) >= 50 and fake.now - one[-1][0] <= 120


def test_nothing_is_known_of_what_a_deaf_listener_did_not_hear(fake, cluster, marks, hasty):
    for _ in range(20):
        cluster.add(random.uniform(0, 60))
    cluster.every(lambda: random.uniform(0, 8), traffic(cluster))
    cluster.run(300)
    for supervisor in cluster.supervisors:
        cluster.run(random.uniform(0, 20))
        supervisor.listener.session.deaf = True
    cluster.run(120)
    assert all(one.listener.fault for one in cluster.supervisors)


def test_nothing_is_known_of_what_had_no_room_during_a_look(fake, cluster, marks):
    """Odoo's loop may get stuck between the steps of a round."""
    supervisor = cluster.add()
    cluster.every(5, traffic(cluster))
    cluster.run(300)
    opening, looked, before = fake.opening, [], dict(marks)[supervisor._backlog][:]

    def open_meanwhile(database):
        if not looked:
            cluster._feeds[0].full = True
            fake.write("x", '"dropped"')
            cluster._feeds[0].full = False
        looked.append(database)
        return opening(database)

    supervisor._opening = open_meanwhile
    while not looked:
        cluster.run(0.01)
    assert looked == ["postgres"] and marks[supervisor._backlog] == before
    # It was owed first, and came by the look.
    cluster.run(120)
    assert any('"dropped"' in payload for _channel, payload in cluster._feeds[0].all())
    assert len(marks[supervisor._backlog]) > len(before)
