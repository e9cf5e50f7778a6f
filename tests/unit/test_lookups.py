"""Look-ups of many databases: none delays another, nor the checks, and none is given up without evidence."""

import math
import threading

import pytest

from bus_alt_connection import catchup, tasks
from bus_alt_connection import supervisor as supervisor_module
from bus_alt_connection.catchup import Backlog
from bus_alt_connection.supervisor import DEAF as DEAF_MODE
from bus_alt_connection.supervisor import LISTENING, POLLING
from tests.unit.fakes import FakeFeed

# As PgBouncer says it where it can't reach the server, and PostgreSQL of a database that does not exist.
UNREACHABLE = "FATAL:  server login has been failing, try again later (server_login_retry)"
GONE = 'pooler:6432: FATAL:  database "x1" does not exist'


def names(number, first=1):
    return ["x%d" % each for each in range(first, number + 1)]


class Sender:
    """Sends to one of ``databases`` after the other, unheard; tells how late each message arrived."""

    def __init__(self, watched, databases):
        self._fake, self._feed, self._databases = watched.fake, watched.feed, databases
        self._sent, self._due, self.late = {}, watched.fake.now, []
        watched.feed.all()

    def __call__(self):
        for payload in self._feed.bus():
            for name in [name for name in self._sent if '"%s"' % name in payload]:
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
def test_databases_that_do_not_answer_delay_no_others_while_polling(settled, trouble, bad, number):
    watched = settled(databases=names(number))
    watched.lose()
    watched.live(30)
    getattr(watched.fake, trouble).update(names(bad))
    # At first nobody knows of the trouble. As many fail at a time as there are places, and not too many at once.
    more = max(bad - catchup.FAILURES, 0) / catchup.FAILURES_EACH_SECOND
    watched.live(catchup.QUICK_TIMEOUT * (1 + bad / catchup.QUICK_AT_ONCE) + more + 6)
    sender = Sender(watched, names(number, bad + 1))
    watched.live(60, step=0.1, meanwhile=sender)
    # The interval, and a second.
    assert len(sender.late) > 50 and sender.longest <= 6
    assert watched.mode == POLLING


@pytest.mark.parametrize("trouble", ["silent", "locked"])
def test_checks_keep_their_interval_while_databases_do_not_answer(settled, options, trouble):
    options.check_interval = 3
    watched = settled(databases=names(10))
    getattr(watched.fake, trouble).update(names(10))
    watched.lose()
    watched.come_back()
    watched.live(5)
    watched.fake.sent.clear()
    watched.live(120)
    sent = watched.fake.sent
    assert len(sent) > 30 and max(after - before for before, after in zip(sent, sent[1:])) <= 3
    assert watched.mode == LISTENING


def test_a_listener_that_is_back_is_noticed_while_look_ups_are_under_way(settled):
    watched = settled(databases=names(3))
    watched.fake.silent.update(names(3))
    watched.lose()
    watched.live(60)
    while not watched._tasks:
        watched.live(0.1)
    watched.come_back()
    watched.live(supervisor_module.SLICE + 0.2)
    assert watched.mode == LISTENING
    # Until these look-ups fail.
    watched.live(10)
    assert watched.mode == LISTENING


def test_look_ups_begin_while_a_check_waits_for_its_connection(watched):
    fake, opening, delivered, deliver = watched.fake, watched.fake.opening, [], watched._deliver

    def opening_slowly(database):
        yield from tasks.sleep(10)
        return (yield from opening(database))

    watched._opening = opening_slowly
    watched._deliver = lambda channels: delivered.append(fake.now) or deliver(channels)
    watched.miss('"missed"')
    began = fake.now
    watched.live(1)
    assert delivered[0] - began < 1


def test_a_database_that_answers_slowly_is_looked_up_and_delays_no_other(settled, fake):
    slow, opening = [], fake.opening

    def opening_slowly(database):
        if database == "x1":
            slow.append(fake.now)
            yield from tasks.sleep(4)
        return (yield from opening(database))

    fake.opening = opening_slowly
    watched = settled(databases=names(3))
    watched.lose()
    watched.live(60)
    slow.clear()
    sender = Sender(watched, ["x2", "x3"])
    watched.live(60, step=0.1, meanwhile=sender)
    assert sender.longest <= 6
    # It takes no more than a tenth of the time.
    assert len(slow) <= 60 / 40 + 1
    fake.write("x1", '"slow"', notify=False)
    watched.live(45)
    assert any('"slow"' in payload for payload in watched.feed.bus())


def test_the_end_of_the_listener_closes_what_is_under_way_and_the_next_goes_on(watched, watch):
    watched.fake.silent.add("x1")
    watched.miss('"missed"')
    while not watched._tasks:
        watched.live(1)
    watched.listener.close()
    watched.run()
    assert not watched._tasks
    watched.fake.silent.clear()
    following = watch(backlog=watched.backlog)
    following.live(15)
    assert '["missed"]' in following.feed.bus()


def test_two_supervisors_of_a_process_look_up_each_database_once(fake, clock):
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
def test_a_pooler_that_is_away_is_asked_rarely_whatever_the_number_of_databases(settled, logged, trouble):
    watched = settled(databases=names(150))
    watched.lose()
    watched.live(30)
    getattr(watched.fake, trouble).add("pooler")
    watched.fake.logins.clear()
    before = len(logged())
    watched.live(180)
    assert len(watched.fake.logins) < 200
    # The others are for debugging.
    assert len([line for line in logged()[before:] if "can't look up" not in line and "can't list" not in line]) <= 4
    assert len(logged("can't look into bus_bus of", "database(s)")) in (1, 2, 3)
    assert watched.mode == DEAF_MODE
    # When it is back, all are looked up soon.
    failing = set(watched.backlog.stuck(watched.fake.now))
    getattr(watched.fake, trouble).clear()
    watched.fake.asked.clear()
    watched.live(8)
    assert failing and not failing - set(watched.fake.asked)
    assert watched.mode == POLLING


@pytest.mark.parametrize("number, takes, fewest, most", [(30, 0.03, 19 * 30, 21 * 30), (200, 0.05, 600, 1200)])
def test_databases_are_polled_as_often_as_is_set_but_take_a_tenth_of_the_time(settled, number, takes, fewest, most):
    watched = settled(databases=names(number))
    watched.fake.takes = takes
    watched.lose()
    watched.live(60)
    watched.fake.asked.clear()
    watched.live(100)
    assert fewest <= len(watched.fake.asked) <= most


def test_after_a_slow_look_up_the_next_one_begins_within_a_minute(settled):
    watched = settled(databases=names(1))
    watched.fake.takes = 20
    watched.lose()
    watched.live(60)
    watched.fake.takes = 0.03
    watched.fake.asked.clear()
    watched.live(catchup.LONGEST_PAUSE + 5)
    assert watched.fake.asked


def test_a_database_that_is_not_used_is_polled_rarely_until_it_is(settled):
    watched = settled(databases=names(2))
    watched.lose()

    def asked_within(seconds):
        watched.fake.asked.clear()
        watched.live(seconds, step=5, meanwhile=lambda: watched._databases.add("x1"))
        return [watched.fake.asked.count(name) for name in ("x1", "x2")]

    asked_within(catchup.UNUSED - 400)
    assert asked_within(100)[1] >= 15
    asked_within(200)
    used, unused = asked_within(catchup.UNUSED_INTERVAL)
    assert used > catchup.UNUSED_INTERVAL / 6 and unused <= 2
    watched._databases.add("x2")
    assert asked_within(11)[1] >= 1


# Only evidence ends it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "refusal, is_listed, reached, goes_on",
    [
        # As PgBouncer 1.18 says of a name that is not in its configuration.
        ("pooler:6432: FATAL:  no such database: x1", True, None, True),
        # As PostgreSQL says with ALLOW_CONNECTIONS false; or of another database.
        ('pooler:6432: FATAL:  database "x1" is not currently accepting connections', True, None, True),
        ('pooler:6432: FATAL:  database "x10" does not exist', True, None, True),
        # An alias in the pooler led elsewhere, or to another server.
        (UNREACHABLE, False, ("y", 1000000), True),
        (UNREACHABLE, False, ("x1", 5), True),
        # The word, or the list, of the server that had it.
        (GONE, True, None, False),
        (UNREACHABLE, False, None, False),
    ],
)
def test_only_the_server_that_had_a_database_ends_its_look_ups(watched, logged, refusal, is_listed, reached, goes_on):
    fake = watched.fake
    fake.refusal, fake.unlisted = refusal, set() if is_listed else {"x1"}
    if reached:
        watched.backlog._reached["x1"] = reached
    fake.away.add("x1")
    watched.miss('"missed"')
    watched.live(300 if goes_on else 30)
    fake.away.clear()
    fake.asked.clear()
    watched.live(30)
    assert ("x1" in fake.asked) is ("x1" in watched._with_bus()) is bool(logged("can't look into")) is goes_on


def test_after_a_day_it_ends(watched):
    watched.fake.away.add("x1")
    watched.miss('"missed"')
    for _ in range(50):
        watched.fake.now += catchup.PENDING_FOR / 40
        watched.live(1)
    assert watched.backlog.next_due(watched.fake.now) == math.inf


# What is looked up ----------------------------------------------------------------------------------------------------


def test_a_database_that_stays_pending_does_not_have_others_looked_up_further_back(settled):
    watched = settled(databases=names(2))
    watched.fake.away.add("x2")
    watched.lose()
    watched.come_back()
    watched.live(10)
    watched.fake.write("x1", '"heard"')
    watched.live(300)
    watched.feed.all()
    watched.miss('"missed"')
    watched.live(10)
    assert watched.feed.bus() == ['["missed"]']
    # What that database has missed itself is looked up all the same.
    watched.fake.write("x2", '"heard, but who knows?"')
    watched.fake.away.clear()
    watched.feed.all()
    watched.live(60)
    assert any("who knows" in payload for payload in watched.feed.bus())


def test_what_a_feed_has_no_room_for_during_a_look_up_is_looked_up_again(watched):
    fake, listener = watched.fake, watched.listener
    # A check in between would take the time of a look-up.
    watched._check = lambda now: now + 60
    watched.backlog.add_pending(["x1"], fake.now)
    fake.takes = 0.9
    before = fake.logins.count("x1")
    watched.round(fake.now)
    with listener._change():
        listener.dropped += 1
    watched.live(100)
    assert fake.logins.count("x1") == before + 2


def test_after_a_failover_to_a_server_behind_that_passed_the_mark_dates_count(watched):
    fake = watched.fake
    watched.lose()
    watched.live(60)
    for _ in range(40):
        fake.write("x1", '"before"')
    watched.live(6)
    # The new primary lacks some of these, and numbers its transactions from there.
    fake.started += 1
    fake._xid -= 30
    del fake.rows["x1"][-30:]
    watched.feed.all()
    for number in range(60):
        fake.write("x1", '"%d"' % number)
    watched.live(10)
    found = "".join(watched.feed.bus())
    assert all('"%d"' % number in found for number in range(60))


def test_many_channels_are_delivered_in_portions_which_do_not_take_long(watched):
    fake, arrived, deliver = watched.fake, [], watched._deliver
    watched._deliver = lambda channels: arrived.append((fake.now, len(channels))) or deliver(channels)
    for number in range(104):
        fake.write("x1", '"%d"' % number, notify=False)
    watched.miss('"missed"')
    watched.live(6, step=0.1)
    assert sum(count for _at, count in arrived) == 105 and len(arrived) == 11
    assert 9.9 * catchup.PAUSE <= arrived[-1][0] - arrived[0][0] <= 3
    portions, running, began = [], tasks.Tasks(), fake.now
    running.start(catchup._delivering(["x"] * 100000, lambda part: portions.append(part) or True))
    while running:
        running.run(math.inf)
    assert len(portions) == catchup.MOST_PORTIONS and fake.now - began <= 11


# Cron -----------------------------------------------------------------------------------------------------------------


def test_a_role_that_may_not_list_databases_has_cron_woken_for_those_that_are_known(settled):
    watched = settled(FakeFeed("cron_trigger"), configured=["main"])
    watched.fake.may_list = False
    for asked in (1, 0):
        watched.lose()
        watched.come_back()
        watched.feed.all()
        watched.fake.logins.clear()
        watched.live(30)
        assert watched.feed.all() == [("cron_trigger", "main"), ("cron_trigger", "x1")]
        # The other login is the check's.
        assert watched.fake.logins.count("postgres") <= 1 + asked


def test_while_databases_can_not_be_listed_that_is_tried_ever_more_rarely(settled):
    watched = settled(FakeFeed("cron_trigger"))
    watched.lose()
    watched.come_back()
    watched.fake.away.add("postgres")
    watched.live(2)
    assert ("cron_trigger", "x1") in watched.feed.all()
    checks, watched._check = watched._check, lambda now: now + 60
    watched.fake.logins.clear()
    watched.live(600)
    assert watched.fake.logins.count("postgres") <= 15
    watched._check = checks
    watched.fake.away.clear()
    watched.live(61)
    assert ("cron_trigger", "postgres") in watched.feed.all()
