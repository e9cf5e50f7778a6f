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
from tests.unit.fakes import FakeFeed, connected, noted

pytestmark = pytest.mark.usefixtures("clock")


@pytest.fixture
def live(fake):
    """Return a function that runs a supervisor for some seconds of ``fake.now``: ``live(supervisor, seconds)``.

    ``meanwhile()`` is called every tenth of a second.
    """

    def live(supervisor, seconds, meanwhile=lambda: None):
        end = fake.now + seconds
        while fake.now < end:
            began = fake.now
            due = supervisor.round(fake.now)
            meanwhile()
            noted(supervisor.listener)
            fake.now = max(fake.now, min(due, began + 0.1), began + 0.001)

    return live


@pytest.fixture
def feed():
    return FakeFeed("imbus", "cron_trigger")


@pytest.fixture
def watched(listen, supervise, live, feed):
    """Return a function that makes a supervisor whose listener hears, of databases x1, x2 and so on."""

    def watched(number):
        supervisor = supervise(listen(feed), ["x%d" % one for one in range(1, number + 1)])
        connected(supervisor.listener)
        live(supervisor, 100)
        assert supervisor.mode == LISTENING
        feed.all()
        return supervisor

    return watched


@pytest.fixture
def lose(fake, events):
    """Return a function that cuts the direct way, for good or until ``fake.forward()``."""

    def lose():
        fake.refuse()
        fake.cut()
        events.wait_for(LOST)

    return lose


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
    def oldest(self):
        """The longest time that a message took, or has been waiting."""
        return max(self.late + [self._fake.now - at for at in self._sent.values()])


# Nobody is kept waiting -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["silent", "locked", "away"])
@pytest.mark.parametrize("bad, number", [(1, 3), (3, 10), (10, 30), (29, 30), (60, 100)])
def test_databases_that_do_not_answer_delay_no_others_while_polling(
    fake, watched, live, lose, feed, trouble, bad, number
):
    supervisor = watched(number)
    lose()
    live(supervisor, 30)
    feed.all()
    getattr(fake, trouble).update("x%d" % one for one in range(1, bad + 1))
    sender = Sender(fake, feed, ["x%d" % one for one in range(bad + 1, number + 1)])
    # At first nobody knows that they don't. As many fail at a time as there are places, and not too many at once.
    more = max(bad - catchup.FAILURES, 0) / catchup.FAILURES_EACH_SECOND
    live(supervisor, catchup.QUICK_TIMEOUT * (1 + bad / catchup.QUICK_AT_ONCE) + more + 6)
    sender = Sender(fake, feed, ["x%d" % one for one in range(bad + 1, number + 1)])
    live(supervisor, 120, sender)
    assert len(sender.late) > 100
    # The interval, and a second.
    assert sender.oldest <= 6
    assert supervisor.mode == POLLING


@pytest.mark.parametrize("trouble", ["silent", "locked"])
def test_checks_keep_their_interval_while_databases_do_not_answer(
    fake, listen, supervise, options, live, lose, feed, trouble
):
    options.check_interval = 3
    supervisor = supervise(listen(feed), ["x%d" % one for one in range(1, 11)])
    listener = supervisor.listener
    connected(listener)
    live(supervisor, 30)
    getattr(fake, trouble).update("x%d" % one for one in range(1, 11))
    lose()
    fake.forward()
    connected(listener)
    live(supervisor, 5)
    fake.sent.clear()
    live(supervisor, 120)
    assert max(after - before for before, after in zip(fake.sent, fake.sent[1:])) <= 3
    assert supervisor.mode == LISTENING


def test_a_listener_that_is_back_is_noticed_while_look_ups_are_under_way(fake, watched, live, lose):
    supervisor = watched(3)
    fake.silent.update(["x1", "x2", "x3"])
    lose()
    live(supervisor, 60)
    fake.forward()
    connected(supervisor.listener)
    live(supervisor, supervisor_module.SLICE + 0.2)
    assert supervisor.mode == LISTENING


def test_a_database_that_answers_slowly_is_looked_up_and_delays_no_other(fake, watched, live, lose, feed):
    supervisor = watched(3)
    slow, opening = [], supervisor._backlog._opening

    def slowly(database):
        if database == "x1":
            slow.append(fake.now)
            yield from tasks.sleep(4)
        return (yield from opening(database))

    supervisor._backlog._opening = slowly
    lose()
    live(supervisor, 60)
    sender = Sender(fake, feed, ["x2", "x3"])
    live(supervisor, 60, sender)
    assert sender.oldest <= 6
    # It takes no more than a tenth of the time.
    assert len([at for at in slow if at > slow[0] + 20]) <= 100 / 40 + 1
    fake.write("x1", '"slow"', notify=False)
    live(supervisor, 45)
    assert any('"slow"' in payload for _channel, payload in feed.all())


def test_a_database_that_needs_more_than_a_second_gets_it_at_once(fake, watched, live, lose, feed):
    supervisor = watched(1)
    lose()
    fake.write("x1", '"lost?"', notify=False)
    fake.takes = 1.5
    fake.forward()
    connected(supervisor.listener)
    began, at, deliver = fake.now, [], supervisor._deliver
    supervisor._deliver = lambda channels: at.append(fake.now) or deliver(channels)
    live(supervisor, 10)
    # The check, the look-up that has a second, and the one that has more.
    assert at[0] - began < 1.5 + catchup.QUICK_TIMEOUT + 1.5 + 0.3


def test_the_end_of_the_listener_closes_what_is_under_way_and_the_next_goes_on(
    fake, watched, live, lose, listen, supervise, feed, events
):
    supervisor = watched(1)
    fake.silent.add("x1")
    lose()
    fake.write("x1", '"lost?"', notify=False)
    while not supervisor._tasks:
        live(supervisor, 1)
    supervisor.listener.close()
    supervisor.run()
    assert not supervisor._tasks and not supervisor._backlog._in_flight
    fake.silent.clear()
    fake.forward()
    other = FakeFeed("imbus")
    following = supervise(listen(other), ["x1"], supervisor._backlog)
    connected(following.listener)
    live(following, 15)
    assert ("imbus", '["lost?"]') in other.all()


def test_two_supervisors_may_look_up_at_once(fake):
    backlog, errors = Backlog(fake.opening), []
    databases = ["x%d" % one for one in range(300)]
    fake.rows.update((one, [(1, fake.now, '"a"')]) for one in databases)
    backlog.add_pending(databases, fake.now, afresh=True)

    def look_up():
        try:
            backlog.start(tasks.Tasks(), lambda channels: True, fake.now)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=look_up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert errors == [] and sorted(fake.asked) == sorted(databases)


# Many databases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["away", "silent"])
def test_a_pooler_that_is_away_is_asked_rarely_whatever_the_number_of_databases(
    fake, watched, live, lose, feed, logged, trouble
):
    supervisor = watched(500)
    lose()
    live(supervisor, 30)
    getattr(fake, trouble).add("pooler")
    fake.logins.clear()
    before = len(logged())
    live(supervisor, 180)
    assert len(fake.logins) < 200
    # The others are for debugging.
    assert len([line for line in logged()[before:] if "can't look up" not in line and "can't list" not in line]) <= 4
    assert len(logged("can't look into bus_bus of", "database(s)")) in (1, 2, 3)
    assert supervisor.mode == DEAF_MODE
    # When it is back, all are looked up soon.
    failing = set(supervisor._backlog.stuck(fake.now))
    getattr(fake, trouble).clear()
    fake.asked.clear()
    live(supervisor, 8)
    assert failing and not failing - set(fake.asked)
    sender = Sender(fake, feed, ["x77", "x444"])
    live(supervisor, 60, sender)
    assert sender.oldest <= 6 and supervisor.mode == POLLING


def test_look_ups_take_a_tenth_of_the_time(fake, watched, live, lose):
    supervisor = watched(200)
    fake.takes = 0.05
    lose()
    live(supervisor, 60)
    busy, run_tasks = [], supervisor._run_tasks

    def note(until):
        began = fake.now
        run_tasks(until)
        busy.append(fake.now - began)
        return 0.0

    supervisor._run_tasks = note
    live(supervisor, 400)
    assert 30 < sum(busy) < 50


def test_few_databases_are_polled_as_often_as_is_set(fake, watched, live, lose):
    supervisor = watched(30)
    fake.takes = 0.03
    lose()
    live(supervisor, 60)
    fake.asked.clear()
    live(supervisor, 100)
    assert 19 * 30 <= len(fake.asked) <= 21 * 30


def test_a_database_that_is_not_used_is_polled_rarely_until_it_is(fake, watched, live, lose):
    supervisor = watched(2)
    lose()
    live(supervisor, catchup.UNUSED - 200, lambda: supervisor._databases.add("x1"))
    fake.asked.clear()
    live(supervisor, 100, lambda: supervisor._databases.add("x1"))
    assert fake.asked.count("x2") >= 19
    live(supervisor, 1500, lambda: supervisor._databases.add("x1"))
    fake.asked.clear()
    live(supervisor, 1200, lambda: supervisor._databases.add("x1"))
    assert fake.asked.count("x1") > 200 and fake.asked.count("x2") <= 3
    supervisor._databases.add("x2")
    fake.asked.clear()
    live(supervisor, 11)
    assert fake.asked.count("x2") >= 1


# Only evidence ends it ------------------------------------------------------------------------------------------------


def looked_up_after(seconds, fake, supervisor, live, lose):
    """Have x1 missed while it refuses as is set, for so many seconds; return whether it is looked up after that."""
    lose()
    fake.write("x1", '"lost?"', notify=False)
    fake.forward()
    connected(supervisor.listener)
    live(supervisor, seconds)
    fake.away.clear()
    fake.asked.clear()
    live(supervisor, 30)
    return "x1" in fake.asked


@pytest.mark.parametrize(
    "refusal",
    [
        # As PgBouncer 1.18 has it, of a name that is not in its configuration; and of a server that it can't reach.
        "pooler:6432: FATAL:  no such database: x1",
        "FATAL:  server login has been failing, try again later (server_login_retry)",
        # As PostgreSQL has it: ALLOW_CONNECTIONS false; or of somebody else's.
        'pooler:6432: FATAL:  database "x1" is not currently accepting connections',
        'pooler:6432: FATAL:  database "x10" does not exist',
    ],
)
@pytest.mark.parametrize("listed", ["by its server", "by none that is known", "by another server"])
def test_weak_evidence_does_not_end_it(fake, watched, live, lose, refusal, listed):
    supervisor = watched(1)
    fake.refusal = refusal
    fake.away.add("x1")
    rows = fake.rows["x1"]
    if listed == "by none that is known":
        # It has another name there.
        supervisor._backlog._reached["x1"] = "y", fake.started
    elif listed == "by another server":
        supervisor._backlog._reached["x1"] = "x1", 5
    if listed != "by its server":
        del fake.rows["x1"]
    fake.rows["x1"], listing = rows, listed == "by its server"
    fake.unlisted = set() if listing else {"x1"}
    assert looked_up_after(300, fake, supervisor, live, lose)


def test_the_word_of_the_server_ends_it(fake, watched, live, lose):
    supervisor = watched(1)
    fake.refusal = 'pooler:6432: FATAL:  database "x1" does not exist'
    fake.away.add("x1")
    assert not looked_up_after(10, fake, supervisor, live, lose)
    assert supervisor._with_bus() == set()


def test_its_absence_from_the_very_server_that_had_it_ends_it(fake, watched, live, lose, logged):
    supervisor = watched(1)
    fake.refusal = "FATAL:  server login has been failing, try again later (server_login_retry)"
    fake.away.add("x1")
    fake.unlisted = {"x1"}
    assert not looked_up_after(30, fake, supervisor, live, lose)
    assert supervisor._with_bus() == set() and not logged("can't look into")


def test_after_a_day_it_ends(fake, watched, live, lose):
    supervisor = watched(1)
    fake.away.add("x1")
    lose()
    fake.forward()
    connected(supervisor.listener)
    for _ in range(50):
        fake.now += catchup.PENDING_FOR / 40
        live(supervisor, 1)
    assert supervisor._backlog.next_due(fake.now) == math.inf


def test_one_that_stays_pending_does_not_keep_others_from_knowing_what_they_heard(fake, watched, live, lose, feed):
    supervisor = watched(2)
    fake.away.add("x2")
    lose()
    fake.forward()
    connected(supervisor.listener)
    live(supervisor, 10)
    fake.write("x1", '"heard"')
    live(supervisor, 300)
    lose()
    fake.write("x1", '"missed"', notify=False)
    fake.forward()
    connected(supervisor.listener)
    feed.all()
    live(supervisor, 10)
    bus = [payload for channel, payload in feed.all() if channel == "imbus"]
    assert bus == ['["missed"]']
    # And it gets all that it missed itself.
    fake.write("x2", '"heard, but who knows?"')
    fake.away.clear()
    live(supervisor, 60)
    assert any("who knows" in payload for channel, payload in feed.all() if channel == "imbus")


def test_what_had_no_room_while_a_look_up_was_under_way_is_looked_up_again(fake, watched, live, feed):
    supervisor = watched(1)
    listener = supervisor.listener
    # A check in between would take the time of a look-up.
    supervisor._check = lambda now: now + 60
    supervisor._backlog.add_pending(["x1"], fake.now)
    fake.takes = 0.9
    supervisor.round(fake.now)
    assert supervisor._backlog._in_flight and fake.logins.count("x1") == 2
    with listener._change():
        listener.dropped += 1
    live(supervisor, 5)
    assert fake.logins.count("x1") == 3
    # And no more than that.
    live(supervisor, 100)
    assert fake.logins.count("x1") == 3


def test_after_a_failover_that_has_passed_the_mark_dates_tell(fake, watched, live, lose, feed, events):
    supervisor = watched(1)
    lose()
    live(supervisor, 60)
    for _ in range(40):
        fake.write("x1", '"before"', notify=False)
    live(supervisor, 6)
    # The new primary has not got all of it, but its transactions are numbered from there.
    fake.started += 1
    fake._xid -= 30
    del fake.rows["x1"][-30:]
    feed.all()
    for number in range(60):
        fake.write("x1", '"%d"' % number, notify=False)
    live(supervisor, 10)
    found = "".join(payload for _channel, payload in feed.all())
    assert all('"%d"' % number in found for number in range(60))


# Cron -----------------------------------------------------------------------------------------------------------------


def test_a_role_that_may_not_list_databases_is_woken_for_those_that_are_known(
    fake, listen, supervise, live, lose, feed, events
):
    supervisor = supervise(listen(feed), ["x1"], configured=["main"])
    connected(supervisor.listener)
    live(supervisor, 60)
    fake.may_list = False
    for expected in (1, 0):
        lose()
        fake.forward()
        connected(supervisor.listener)
        feed.all()
        fake.logins.clear()
        live(supervisor, 30)
        assert [payload for channel, payload in feed.all() if channel == "cron_trigger"] == ["main", "x1"]
        # One is the check.
        assert fake.logins.count("postgres") <= 1 + expected


def test_while_databases_can_not_be_listed_that_is_tried_ever_more_rarely(fake, watched, live, lose, feed):
    supervisor = watched(1)
    lose()
    fake.forward()
    connected(supervisor.listener)
    fake.away.add("postgres")
    fake.logins.clear()
    live(supervisor, 2)
    assert ("cron_trigger", "x1") in feed.all()
    checks, supervisor._check = supervisor._check, lambda now: now + 60
    fake.logins.clear()
    live(supervisor, 600)
    assert fake.logins.count("postgres") <= 15
    supervisor._check = checks
    fake.away.clear()
    feed.all()
    live(supervisor, 61)
    assert ("cron_trigger", "postgres") in feed.all()


# In portions ----------------------------------------------------------------------------------------------------------


def test_many_channels_are_delivered_in_portions(fake, watched, live, lose, feed):
    supervisor = watched(1)
    lose()
    for number in range(105):
        fake.write("x1", '"%d"' % number, notify=False)
    arrived, deliver = [], supervisor._deliver

    def note(channels):
        arrived.append((fake.now, "".join(channels)))
        return deliver(channels)

    supervisor._deliver = note
    live(supervisor, 6)
    assert len(arrived) == 11
    assert 9.9 * catchup.PAUSE <= arrived[-1][0] - arrived[0][0] <= 3
    assert all('"%d"' % number in "".join(payload for _at, payload in arrived) for number in range(105))


def test_a_very_large_number_does_not_take_long(fake):
    portions = []
    task = catchup._delivering(["%d" % number for number in range(100000)], lambda part: portions.append(part) or True)
    running = tasks.Tasks()
    began = fake.now
    running.start(task)
    while running:
        running.run(math.inf)
    assert len(portions) == catchup.MOST_PORTIONS and fake.now - began <= 11
