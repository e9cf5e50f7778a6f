"""Look-ups of many databases: none delays another, nor the checks, and none is given up without evidence."""

import math
import threading

import pytest

from bus_alt_connection import catchup, tasks
from bus_alt_connection import supervisor as supervisor_module
from bus_alt_connection.catchup import Backlog
from bus_alt_connection.log import LOST
from bus_alt_connection.supervisor import DEAF as DEAF_MODE
from bus_alt_connection.supervisor import LISTENING, POLLING
from tests.unit.fakes import FakeFeed, connected

pytestmark = pytest.mark.usefixtures("clock")
# As PgBouncer says it where it can't reach the server, and PostgreSQL of a database that does not exist.
UNREACHABLE = "FATAL:  server login has been failing, try again later (server_login_retry)"
GONE = 'pooler:6432: FATAL:  database "x1" does not exist'


def names(number, first=1):
    return ["x%d" % each for each in range(first, number + 1)]


@pytest.fixture
def feed():
    return FakeFeed("imbus", "cron_trigger")


@pytest.fixture
def watched(listen, supervise, run, feed):
    """Return a function that makes a supervisor whose listener hears, of databases x1, x2 and so on."""

    def watched(number, **more):
        supervisor = supervise(listen(feed), names(number), **more)
        connected(supervisor.listener)
        run(100, supervisor, step=5)
        assert supervisor.mode == LISTENING
        feed.all()
        return supervisor

    return watched


@pytest.fixture
def lose(fake, events):
    """Return a function that cuts the direct way, for good or until ``come_back``."""

    def lose():
        fake.refuse()
        fake.cut()
        events.wait_for(LOST)

    return lose


@pytest.fixture
def come_back(fake):
    def come_back(supervisor):
        fake.forward()
        connected(supervisor.listener)

    return come_back


@pytest.fixture
def missed(fake, lose, come_back):
    """Return a function that has the listener miss a message of x1, and come back."""

    def missed(supervisor, channel='"missed"'):
        lose()
        fake.write("x1", channel, notify=False)
        come_back(supervisor)

    return missed


class Sender:
    """Sends to one of ``databases`` after the other, unheard; tells how late each message arrived."""

    def __init__(self, fake, feed, databases):
        self._fake, self._feed, self._databases = fake, feed, databases
        self._sent, self._due, self.late = {}, fake.now, []

    def __call__(self):
        for channel, payload in self._feed.all():
            for name in [name for name in self._sent if channel == "imbus" and '"%s"' % name in payload]:
                self.late.append(self._fake.now - self._sent.pop(name))
        if self._fake.now >= self._due:
            self._due += 0.7
            name = "message %f" % self._fake.now
            self._fake.write(self._databases[len(self.late) % len(self._databases)], '"%s"' % name, notify=False)
            self._sent[name] = self._fake.now

    @property
    def longest(self):
        """The longest time that a message took, or has been waiting."""
        return max(self.late + [self._fake.now - at for at in self._sent.values()])


# No database keeps others waiting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["silent", "locked", "away"])
@pytest.mark.parametrize("bad, number", [(3, 10), (60, 100)])
def test_databases_that_do_not_answer_delay_no_others_while_polling(
    fake, watched, run, lose, feed, trouble, bad, number
):
    supervisor = watched(number)
    lose()
    run(30, supervisor)
    feed.all()
    getattr(fake, trouble).update(names(bad))
    sender = Sender(fake, feed, names(number, bad + 1))
    # At first nobody knows of the trouble. As many fail at a time as there are places, and not too many at once.
    more = max(bad - catchup.FAILURES, 0) / catchup.FAILURES_EACH_SECOND
    run(catchup.QUICK_TIMEOUT * (1 + bad / catchup.QUICK_AT_ONCE) + more + 6, supervisor)
    sender = Sender(fake, feed, names(number, bad + 1))
    run(60, supervisor, step=0.1, meanwhile=sender)
    # The interval, and a second.
    assert len(sender.late) > 50 and sender.longest <= 6
    assert supervisor.mode == POLLING


@pytest.mark.parametrize("trouble", ["silent", "locked"])
def test_checks_keep_their_interval_while_databases_do_not_answer(
    fake, watched, options, run, lose, come_back, trouble
):
    options.check_interval = 3
    supervisor = watched(10)
    getattr(fake, trouble).update(names(10))
    lose()
    come_back(supervisor)
    run(5, supervisor)
    fake.sent.clear()
    run(120, supervisor)
    assert max(after - before for before, after in zip(fake.sent, fake.sent[1:])) <= 3
    assert supervisor.mode == LISTENING and len(fake.sent) > 30


def test_a_listener_that_is_back_is_noticed_while_look_ups_are_under_way(fake, watched, run, lose, come_back):
    supervisor = watched(3)
    fake.silent.update(names(3))
    lose()
    run(60, supervisor)
    while not supervisor._tasks:
        run(0.1, supervisor)
    come_back(supervisor)
    run(supervisor_module.SLICE + 0.2, supervisor)
    assert supervisor.mode == LISTENING
    # Until these look-ups fail.
    run(10, supervisor)
    assert supervisor.mode == LISTENING


def test_a_database_that_answers_slowly_is_looked_up_and_delays_no_other(fake, watched, run, lose, feed):
    supervisor = watched(3)
    slow, opening = [], supervisor._backlog._opening

    def opening_slowly(database):
        if database == "x1":
            slow.append(fake.now)
            yield from tasks.sleep(4)
        return (yield from opening(database))

    supervisor._backlog._opening = opening_slowly
    lose()
    run(60, supervisor)
    sender = Sender(fake, feed, ["x2", "x3"])
    run(60, supervisor, step=0.1, meanwhile=sender)
    assert sender.longest <= 6
    # It takes no more than a tenth of the time.
    assert len([at for at in slow if at > slow[0] + 20]) <= 100 / 40 + 1
    fake.write("x1", '"slow"', notify=False)
    run(45, supervisor)
    assert any('"slow"' in payload for _channel, payload in feed.all())


def test_a_database_that_needs_more_than_a_second_gets_it_at_once(fake, watched, run, missed):
    supervisor = watched(1)
    fake.takes = 1.5
    missed(supervisor)
    began, at, deliver = fake.now, [], supervisor._deliver
    supervisor._deliver = lambda channels: at.append(fake.now) or deliver(channels)
    run(10, supervisor, step=0.1)
    # The check, the look-up that has a second, and the one that has more.
    assert at[0] - began < 1.5 + catchup.QUICK_TIMEOUT + 1.5 + 0.3


def test_the_end_of_the_listener_closes_what_is_under_way_and_the_next_goes_on(
    fake, watched, run, missed, listen, supervise
):
    supervisor = watched(1)
    fake.silent.add("x1")
    missed(supervisor)
    while not supervisor._tasks:
        run(1, supervisor)
    supervisor.listener.close()
    supervisor.run()
    assert not supervisor._tasks
    fake.silent.clear()
    other = FakeFeed("imbus")
    following = supervise(listen(other), ["x1"], supervisor._backlog)
    connected(following.listener)
    run(15, following)
    assert ("imbus", '["missed"]') in other.all()


def test_two_supervisors_of_a_process_look_up_each_database_once(fake):
    backlog, databases = Backlog(fake.opening), names(300)
    fake.rows.update((each, [(1, fake.now, '"a"')]) for each in databases)
    backlog.add_pending(databases, fake.now, afresh=True)
    threads = []
    for _ in range(4):
        own = tasks.Tasks(), lambda channels: True, fake.now
        threads.append(threading.Thread(target=backlog.start, args=own))
        threads[-1].start()
    for thread in threads:
        thread.join(5)
    assert sorted(fake.asked) == sorted(databases)


# How often ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["away", "silent"])
def test_a_pooler_that_is_away_is_asked_rarely_whatever_the_number_of_databases(
    fake, watched, run, lose, feed, logged, trouble
):
    supervisor = watched(150)
    lose()
    run(30, supervisor)
    getattr(fake, trouble).add("pooler")
    fake.logins.clear()
    before = len(logged())
    run(180, supervisor)
    assert len(fake.logins) < 200
    # The others are for debugging.
    assert len([line for line in logged()[before:] if "can't look up" not in line and "can't list" not in line]) <= 4
    assert len(logged("can't look into bus_bus of", "database(s)")) in (1, 2, 3)
    assert supervisor.mode == DEAF_MODE
    # When it is back, all are looked up soon.
    failing = set(supervisor._backlog.stuck(fake.now))
    getattr(fake, trouble).clear()
    fake.asked.clear()
    run(8, supervisor)
    assert failing and not failing - set(fake.asked)
    sender = Sender(fake, feed, ["x77", "x144"])
    run(30, supervisor, step=0.1, meanwhile=sender)
    assert sender.longest <= 6 and supervisor.mode == POLLING


@pytest.mark.parametrize("number, fewest, most", [(30, 19 * 30, 21 * 30), (200, 600, 1200)])
def test_databases_are_polled_as_often_as_is_set_but_take_a_tenth_of_the_time(
    fake, watched, run, lose, number, fewest, most
):
    supervisor = watched(number)
    fake.takes = 0.05 if number > 100 else 0.03
    lose()
    run(60, supervisor)
    fake.asked.clear()
    run(100, supervisor)
    assert fewest <= len(fake.asked) <= most


def test_a_database_that_is_not_used_is_polled_rarely_until_it_is(fake, watched, run, lose):
    supervisor = watched(2)
    lose()

    def asked_within(seconds):
        fake.asked.clear()
        run(seconds, supervisor, step=5, meanwhile=lambda: supervisor._databases.add("x1"))
        return fake.asked.count("x1"), fake.asked.count("x2")

    asked_within(catchup.UNUSED - 200)
    assert asked_within(100)[1] >= 19
    asked_within(200)
    x1, x2 = asked_within(catchup.UNUSED_INTERVAL)
    assert x1 > catchup.UNUSED_INTERVAL / 6 and x2 <= 2
    supervisor._databases.add("x2")
    assert asked_within(11)[1] >= 1


# Only evidence ends it ------------------------------------------------------------------------------------------------


def is_looked_up_after(seconds, fake, supervisor, run, missed):
    """Have x1 missed while it refuses, for so many seconds; return whether it is looked up after that."""
    fake.away.add("x1")
    missed(supervisor)
    run(seconds, supervisor)
    fake.away.clear()
    fake.asked.clear()
    run(30, supervisor)
    return "x1" in fake.asked


@pytest.mark.parametrize(
    "refusal",
    [
        # As PgBouncer 1.18 says of a name that is not in its configuration.
        "pooler:6432: FATAL:  no such database: x1",
        # As PostgreSQL says with ALLOW_CONNECTIONS false; or of another database.
        'pooler:6432: FATAL:  database "x1" is not currently accepting connections',
        'pooler:6432: FATAL:  database "x10" does not exist',
    ],
)
def test_what_does_not_prove_that_a_database_is_gone_does_not_end_it(fake, watched, run, missed, refusal):
    supervisor = watched(1)
    fake.refusal = refusal
    assert is_looked_up_after(300, fake, supervisor, run, missed)


@pytest.mark.parametrize("reached", [("y", None), ("x1", 5)], ids=["alias in the pooler", "another server"])
def test_the_list_of_a_server_proves_nothing_on_what_was_reached_elsewhere(fake, watched, run, missed, reached):
    supervisor = watched(1)
    fake.refusal, fake.unlisted = UNREACHABLE, {"x1"}
    name, started = reached
    supervisor._backlog._reached["x1"] = name, started or fake.started
    assert is_looked_up_after(300, fake, supervisor, run, missed)


@pytest.mark.parametrize("refusal, unlisted", [(GONE, set()), (UNREACHABLE, {"x1"})], ids=["its word", "its list"])
def test_the_server_that_had_a_database_ends_it(fake, watched, run, missed, logged, refusal, unlisted):
    supervisor = watched(1)
    fake.refusal, fake.unlisted = refusal, unlisted
    assert not is_looked_up_after(30, fake, supervisor, run, missed)
    assert supervisor._with_bus() == set() and not logged("can't look into")


def test_after_a_day_it_ends(fake, watched, run, missed):
    supervisor = watched(1)
    fake.away.add("x1")
    missed(supervisor)
    for _ in range(50):
        fake.now += catchup.PENDING_FOR / 40
        run(1, supervisor)
    assert supervisor._backlog.next_due(fake.now) == math.inf


# What is looked up ----------------------------------------------------------------------------------------------------


def test_a_database_that_stays_pending_does_not_have_others_looked_up_further_back(
    fake, watched, run, missed, lose, come_back, feed
):
    supervisor = watched(2)
    fake.away.add("x2")
    lose()
    come_back(supervisor)
    run(10, supervisor)
    fake.write("x1", '"heard"')
    run(300, supervisor, step=10)
    feed.all()
    missed(supervisor)
    run(10, supervisor)
    assert [payload for channel, payload in feed.all() if channel == "imbus"] == ['["missed"]']
    # What that database has missed itself is looked up all the same.
    fake.write("x2", '"heard, but who knows?"')
    fake.away.clear()
    feed.all()
    run(60, supervisor)
    assert any("who knows" in payload for channel, payload in feed.all() if channel == "imbus")


def test_what_a_feed_has_no_room_for_during_a_look_up_is_looked_up_again(fake, watched, run):
    supervisor = watched(1)
    listener = supervisor.listener
    # A check in between would take the time of a look-up.
    supervisor._check = lambda now: now + 60
    supervisor._backlog.add_pending(["x1"], fake.now)
    fake.takes = 0.9
    before = fake.logins.count("x1")
    supervisor.round(fake.now)
    with listener._change():
        listener.dropped += 1
    run(100, supervisor)
    assert fake.logins.count("x1") == before + 2


def test_after_a_failover_to_a_server_behind_that_passed_the_mark_dates_count(fake, watched, run, lose, feed):
    supervisor = watched(1)
    lose()
    run(60, supervisor)
    for _ in range(40):
        fake.write("x1", '"before"', notify=False)
    run(6, supervisor)
    # The new primary lacks some of these, and numbers its transactions from there.
    fake.started += 1
    fake._xid -= 30
    del fake.rows["x1"][-30:]
    feed.all()
    for number in range(60):
        fake.write("x1", '"%d"' % number, notify=False)
    run(10, supervisor)
    found = "".join(payload for _channel, payload in feed.all())
    assert all('"%d"' % number in found for number in range(60))


def test_many_channels_are_delivered_in_portions_which_do_not_take_long(fake, watched, run, missed):
    supervisor = watched(1)
    for number in range(104):
        fake.write("x1", '"%d"' % number, notify=False)
    arrived, deliver = [], supervisor._deliver
    supervisor._deliver = lambda channels: arrived.append((fake.now, len(channels))) or deliver(channels)
    missed(supervisor)
    run(6, supervisor, step=0.1)
    assert sum(count for _at, count in arrived) == 105 and len(arrived) == 11
    assert 9.9 * catchup.PAUSE <= arrived[-1][0] - arrived[0][0] <= 3
    portions, running, began = [], tasks.Tasks(), fake.now
    running.start(catchup._delivering(["x"] * 100000, lambda part: portions.append(part) or True))
    while running:
        running.run(math.inf)
    assert len(portions) == catchup.MOST_PORTIONS and fake.now - began <= 11


# Cron -----------------------------------------------------------------------------------------------------------------


def test_a_role_that_may_not_list_databases_has_cron_woken_for_those_that_are_known(
    fake, watched, run, lose, come_back, feed
):
    supervisor = watched(1, configured=["main"])
    fake.may_list = False
    for asked in (1, 0):
        lose()
        come_back(supervisor)
        feed.all()
        fake.logins.clear()
        run(30, supervisor)
        assert [payload for channel, payload in feed.all() if channel == "cron_trigger"] == ["main", "x1"]
        # The other login is the check's.
        assert fake.logins.count("postgres") <= 1 + asked


def test_while_databases_can_not_be_listed_that_is_tried_ever_more_rarely(fake, watched, run, lose, come_back, feed):
    supervisor = watched(1)
    lose()
    come_back(supervisor)
    fake.away.add("postgres")
    run(2, supervisor)
    assert ("cron_trigger", "x1") in feed.all()
    checks, supervisor._check = supervisor._check, lambda now: now + 60
    fake.logins.clear()
    run(600, supervisor)
    assert fake.logins.count("postgres") <= 15
    supervisor._check = checks
    fake.away.clear()
    run(61, supervisor)
    assert ("cron_trigger", "postgres") in feed.all()
