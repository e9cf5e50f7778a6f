"""Which databases are looked up and when: rarely if they do not answer, and none is given up without evidence."""

import math

import pytest

from bus_alt_connection import catchup, tasks
from bus_alt_connection.supervisor import DEAF as DEAF_MODE
from bus_alt_connection.supervisor import POLLING
from tests.unit.fakes import FakeFeed

# As PgBouncer says it where it can't reach the server, and PostgreSQL of a database that does not exist.
UNREACHABLE = "FATAL:  server login has been failing, try again later (server_login_retry)"
GONE = 'pooler:6432: FATAL:  database "x1" does not exist'


def names(number):
    return ["x%d" % each for each in range(1, number + 1)]


# No database keeps others waiting -------------------------------------------------------------------------------------


def test_databases_that_do_not_answer_delay_no_other_while_polling(settled):
    watched = settled(databases=names(6))
    watched.lose()
    watched.live(30)
    watched.fake.silent.update(names(5))
    watched.live(30)
    for number in range(5):
        watched.fake.write("x6", '"%d"' % number)
        # The interval, and a second.
        watched.live(6)
        assert watched.feed.bus() == ['["%d"]' % number]
    assert watched.status()["counters"]["notifications_caught_up"] == 5


# How often ------------------------------------------------------------------------------------------------------------


def test_a_pooler_that_is_away_is_asked_rarely_whatever_the_number_of_databases(settled):
    watched = settled(databases=names(80))
    watched.lose()
    watched.live(30)
    watched.fake.away.add("pooler")
    watched.fake.logins.clear()
    watched.live(180)
    assert len(watched.fake.logins) < 200
    assert watched.mode == DEAF_MODE
    # When it is back, all are looked up soon.
    failing = set(watched.backlog.stuck(watched.fake.now))
    watched.fake.away.clear()
    watched.fake.asked.clear()
    watched.live(8)
    assert failing and not failing - set(watched.fake.asked)
    assert watched.mode == POLLING


@pytest.mark.parametrize("takes, fewest, most", [(0.03, 19 * 30, 21 * 30), (0.5, 90, 150)])
def test_databases_are_polled_as_often_as_is_set_but_take_a_tenth_of_the_time(settled, takes, fewest, most):
    watched = settled(databases=names(30))
    watched.fake.takes = takes
    watched.lose()
    watched.live(60)
    watched.fake.asked.clear()
    watched.live(100)
    assert fewest <= len(watched.fake.asked) <= most


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
        # As PostgreSQL says of another database.
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
    assert ("x1" in fake.asked) is ("x1" in watched._with_bus()) is bool(logged("can't look up missed")) is goes_on


def test_after_a_day_it_ends(watched):
    watched.fake.away.add("x1")
    watched.miss('"missed"')
    for _ in range(50):
        watched.fake.now += catchup.PENDING_FOR / 40
        watched.live(1)
    assert watched.backlog.next_due(watched.fake.now) == math.inf


# What is looked up ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, portions", [(105, 11), (100000, catchup.MOST_PORTIONS)])
def test_many_channels_are_delivered_in_portions_which_do_not_take_long(fake, clock, number, portions):
    sizes, began = [], fake.now
    tasks.finish(catchup._delivering(["x"] * number, lambda part: sizes.append(len(part)) or True))
    assert sum(sizes) == number and len(sizes) == portions
    assert fake.now - began == pytest.approx((portions - 1) * catchup.PAUSE)


@pytest.mark.parametrize("accepted", [True, False])
@pytest.mark.parametrize("dropped", [0, 1])
def test_what_the_feeds_had_no_room_for_is_looked_up_again(fake, clock, accepted, dropped):
    fake.rows["x1"] = []
    fake.write("x1", '"a"')
    backlog, running, delivered = catchup.Backlog(fake.opening), tasks.Tasks(), []

    def deliver(channels):
        if not delivered:
            # As the supervisor does when a feed has dropped something meanwhile.
            backlog.add_pending(["x1"] * dropped, fake.now)
        delivered.extend(channels)
        return accepted

    # One of these databases has no bus_bus.
    backlog.add_pending(["x1", "x2"], fake.now, afresh=True)
    backlog.start(running, deliver, fake.now)
    assert fake.asked == ["x1"] * (1 + dropped) and not running
    assert list(backlog._pending) == ([] if accepted else ["x1"])


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


def test_if_databases_can_not_be_listed_cron_is_woken_later_for_those_that_are_not_known(settled):
    watched = settled(FakeFeed("cron_trigger"))
    watched.lose()
    watched.come_back()
    watched.fake.away.add("postgres")
    watched.live(30)
    assert set(watched.feed.all()) == {("cron_trigger", "x1")}
    watched.fake.away.clear()
    watched.live(60)
    assert ("cron_trigger", "postgres") in watched.feed.all()
