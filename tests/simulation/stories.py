"""Faults that take special conditions: one story each, in the same world, without chance.

A story is a function whose docstring says what has to hold. It returns ``(value, limit)``, and fails if the value is
above the limit. ``python -m tests.simulation --stories`` tells all of them.
"""

import statistics

from . import faults, invariants, kernel, world
from .odoo import CRON, GEVENT, THREADED

NEVER = float("inf")
#: all stories in order
STORIES = []


def _story(function):
    STORIES.append(function)
    return function


def _begin(addon, processes, seed=1, settle=100, apart=0.5, kinds=(), **options):
    """Return a world in which ``processes``, started ``apart`` seconds from each other, have listened for a while."""
    chosen = {"databases": ["d1", "d2", "d3"], "check_interval": 60, "poll_interval": 5, "share": True, "machines": 1}
    chosen.update(normal_rate=2.0, long_transactions=0, preemption=0, processes=list(processes))
    chosen.update(feed_size=None, head_start=0.0, pool_size=2)
    chosen.update(options)
    one = world.World(addon, seed, kinds, keep_trace=True, **chosen)
    # A story judges for itself.
    one.late_limit = one.silent_limit = one.cron_limit = float("inf")
    one.send()
    for kind in processes:
        one.start_odoo(kind)
        one.advance(apart)
    one.advance(settle)
    return one


def _late(one, since, databases=None, but=()):
    """Return how late messages that were sent after ``since`` were, in seconds; infinite for those that never came."""
    found = []
    for process in one.odoos:
        if process not in but:
            found += one.watch.lateness(process, since, one.now - 30, databases or one.databases)
    return found


def _break_direct_way(one):
    one.happen(faults.KINDS["direct_way_refuses"], 1e6)


def _leader(one):
    return next(process for process in one.odoos if one.direct_connections(process))


@_story
def locked_database_delays_no_other_while_polling(addon):
    """While bus_bus of one database of three is locked, polling looks up the others within poll_interval + 1 s."""
    # Few messages, since the addon delivers only so many in a second of what it has looked up.
    one = _begin(addon, [GEVENT], normal_rate=0.5)
    _break_direct_way(one)
    one.cluster.lock("d1")
    one.advance(60)
    since = one.now
    one.advance(300)
    return max(_late(one, since, ["d2", "d3"]), default=NEVER), one.poll_interval + 1


@_story
def locked_databases_do_not_delay_checks(addon):
    """While bus_bus of a database is locked, a path that dies without a word is noticed within check_interval."""
    worst = 0.0
    for moment in range(0, 40, 4):
        one = _begin(addon, [GEVENT], settle=30, check_interval=6)
        one.cluster.lock("d1")
        _cut(one)
        one.advance(20 + moment)
        since = one.now
        for link in one.direct_path.links:
            link.lose(silent=True)
        one.advance(100)
        worst = max([worst, *(_late(one, since, ["d2", "d3"]) or [NEVER])])
        world.forget_last()
    return worst, one.check_interval + 1


@_story
def leader_that_stands_still_is_left(addon):
    """While the leader stands still for 30 s, its followers hear within 5 s, whatever the check interval is."""
    one = _begin(addon, [GEVENT, GEVENT, GEVENT])
    leader, since = _leader(one), one.now
    leader.stop()
    one.advance(30)
    leader.go_on()
    one.advance(60)
    return max(_late(one, since, but=[leader]), default=NEVER), 5.5


@_story
def triggered_cron_does_not_wait_for_a_leader_that_stands_still(addon):
    """While the leader's interpreter is held for 12 s, a cron worker is woken within 6 s."""
    one = _begin(addon, [CRON, CRON])
    leader, since = _leader(one), one.now
    leader.stop()
    for second in range(8):
        one.after(second, one.trigger_cron)
    one.after(12, leader.go_on)
    one.advance(90)
    late = [seconds for at, process, seconds in one.watch.cron_lateness if at > since and process is not leader]
    late += one.watch.cron_waits(but=leader)
    return max(late, default=NEVER), 6.0


@_story
def busy_machine_parts_nobody(addon):
    """If all processes of a machine get no CPU for 4 s at a time, no follower leaves: no line in the log."""
    one = _begin(addon, [GEVENT, GEVENT, CRON])
    lines = one.watch.lines
    for _time in range(5):
        for process in one.odoos:
            process.stop()
        one.advance(4)
        for process in one.rng.sample(one.odoos, 3):
            process.go_on()
            one.advance(0.05)
        one.advance(10)
    return one.watch.lines - lines, 0


@_story
def blocking_log_does_not_delay_the_reconnect(addon):
    """With a log handler that takes 8 s for each line, a lost listener hears again within a second."""
    # So much is sent, and connecting takes so long, that something is missed meanwhile and has to be looked up.
    one = _begin(addon, [GEVENT], normal_rate=20.0)
    one.direct_path.latency = 0.03
    _leader(one).log_seconds = 8.0
    since = one.now
    _cut(one)
    one.advance(60)
    return max(_late(one, since), default=NEVER), 1.0


@_story
def second_loss_is_as_fast_as_the_first(addon):
    """Ten kills, each half a second after pushes arrive again: the listener is back within 0.1 s (median)."""
    one = _begin(addon, [GEVENT], normal_rate=50.0)
    took = []
    for _kill in range(10):
        since = one.now
        _cut(one)
        one.advance(0.5)
        while not one.watch.lateness(one.odoos[0], since, one.now, one.databases, received_only=True):
            one.advance(0.5)
        took.append(_first_push(one, since))
        one.advance(0.5)
    return statistics.median(took), 0.1


@_story
def path_that_is_cut_at_each_notification_is_not_flooded(addon):
    """A middlebox that cuts the connection at the first notification causes at most 20 connections in 10 s."""
    one = _begin(addon, [GEVENT], normal_rate=50.0)
    one.watch.most_connects = 0

    def cut():
        for link in list(one.direct_path.links):
            if not link.over and link.server is not None:
                one.direct_path.cut(link)
        one.after(0.02, cut)

    cut()
    one.advance(30)
    return one.watch.most_connects, 20


@_story
def failover_to_a_server_behind_loses_nothing_while_polling(addon):
    """While polling, another server takes over that is behind, and passes the old mark before the next look-up."""
    one = _begin(addon, [GEVENT], normal_rate=0.2, poll_interval=5)
    _break_direct_way(one)
    one.advance(60)
    since = one.now
    for _failover in range(10):
        one.rate = 20.0
        one.cluster.stop(None)
        one.watch.forget_rows(one.cluster.lag_behind(3))
        one.start_server()
        one.advance(10)
        one.rate = 0.2
        one.advance(40)
    return sum(seconds == float("inf") for seconds in _late(one, since)), 0


@_story
def silent_restart_is_no_other_server(addon):
    """After a restart that the listener was not told of, no ERROR says that it is at another server."""
    one = _begin(addon, [GEVENT, CRON], check_interval=12)
    one.cluster.stop(None, silently=True)
    one.start_server()
    one.advance(60)
    return one.watch.wrong_advice, 0


@_story
def followers_behind_a_pooler_are_quiet(addon):
    """Listeners that reach a pooler in transaction mode and share write two lines a minute at most, each."""
    one = _begin(addon, [GEVENT, GEVENT, CRON], kinds=["direct_way_is_a_pooler"])
    lines = one.watch.lines
    one.advance(600)
    return (one.watch.lines - lines) / 10 / 3, 2


@_story
def process_has_one_listener(addon):
    """Threads that open their cursors at the same time get one listener: no process connects twice (40 starts)."""
    return _most_bad(addon, [THREADED], lambda one: len(one.direct_connections(one.odoos[0])) - 1, share=False)


@_story
def first_followers_of_a_leader_stay(addon):
    """If a listener becomes the leader while it listens, it serves its first followers (20 times)."""
    most = 0
    for seed in range(20):
        one = _begin(addon, [CRON] * 5, seed=seed, settle=4, apart=0.1, check_interval=3)
        leader = _leader(one)
        # While a child keeps the name bound, each of the others listens by itself.
        child = leader.fork()
        leader.kill()
        one.advance(5)
        before = one.watch.count_lines("does not answer")
        child.kill()
        one.kernel.head_start = 0.5
        one.advance(5)
        most = max(most, one.watch.count_lines("does not answer") - before)
        world.forget_last()
    return most, 0


@_story
def fork_does_not_keep_the_name(addon):
    """If a child of a killed leader holds copies of its descriptors, the others share a new leader nevertheless."""
    one = _begin(addon, [GEVENT, GEVENT, GEVENT, GEVENT])
    leader = _leader(one)
    leader.fork()
    leader.kill()
    one.advance(120)
    return sum(len(one.direct_connections(process)) for process in one.odoos), 1


@_story
def stale_primary_in_front_is_got_past(addon):
    """With a stale primary in front of the host list, the listener is at the right server after 25 s."""
    one = _begin(addon, [GEVENT], kinds=["stale_primary_first"], settle=25)
    return one.odoos[0].modes() != ["listening"], 0


@_story
def second_database_behind_pgdog_does_not_claim_to_listen(addon):
    """Where a pooler knows channels by name only, a listener that does not hear does not say "listening"."""
    one = _begin(addon, [], kinds=["pooler_knows_listen"], check_interval=6, settle=0)
    one.other_listeners = ["d1", "d2"]
    process = one.start_odoo(GEVENT)
    one.advance(60)
    since, modes = one.now, process.modes_by_database()
    for database in one.other_listeners:
        one.cluster.notify(1, database, "orders", database)
    one.advance(10)
    heard = {database for at, database, payload in process.heard_elsewhere if at >= since and payload == database}
    return sum(modes[database] == "listening" and database not in heard for database in one.other_listeners), 0


@_story
def leader_out_of_descriptors_goes_on(addon):
    """A process without descriptors that loses its connection listens again once it has some."""
    one = _begin(addon, [GEVENT], check_interval=6)
    process = one.odoos[0]
    process.no_descriptors = True
    _cut(one)
    one.advance(120)
    process.no_descriptors = False
    one.advance(20)
    return process.modes() != ["listening"], 0


@_story
def self_check_wakes_a_hundred_listeners_rarely(addon):
    """100 listeners with a connection each are woken 15,000 times in their first hour, by 200 NOTIFYs at most.

    PostgreSQL wakes all that listen in the database. Each listener sends a NOTIFY when it begins; after that one a
    minute is enough for all of them. The first five minutes after the last beginning stand for the hour.
    """
    one = _begin(addon, [], normal_rate=1e-9, share=False, settle=0)
    one.cluster._most_backends = 300
    notify, woken = one.cluster.notify, []

    def counted(pid, database, channel, payload):
        woken.append(sum(backend.database == database and bool(backend.listens) for backend in one.cluster.backends))
        notify(pid, database, channel, payload)

    one.cluster.notify = counted
    for _listener in range(100):
        one.start_odoo(GEVENT)
        one.advance(0.2)
    first = len(woken)
    one.kernel.run(one.now + 300)
    hour = woken[:first] + 12 * woken[first:]
    return (sum(hour) if len(hour) <= 200 else NEVER), 15000


def _cut(one):
    for link in list(one.direct_path.links):
        if not link.over:
            one.direct_path.cut(link)


def _first_push(one, since):
    """Return the seconds from ``since`` to the first message that arrived after that."""
    return min(arrived for arrived in one.watch.arrivals[one.odoos[0]] if arrived > since) - since


def _most_bad(addon, processes, count, **options):
    """Return the highest of what ``count(world)`` returns after 40 starts with preemption, and the limit 0."""
    most = 0
    for seed in range(40):
        one = _begin(addon, processes, seed=seed, settle=30, apart=0, preemption=0.1, check_interval=12, **options)
        most = max(most, count(one))
        world.forget_last()
    return most, 0


def tell(addon, names):
    """Tell the stories of ``names``, or all; return how many failed."""
    failed = 0
    for story in STORIES:
        if names and story.__name__ not in names:
            continue
        value, limit = story(addon)
        failed += value > limit
        print(
            "%-4s %-62s %8.3f, limit %g" % ("ok" if value <= limit else "FAIL", story.__name__, value, limit),
            flush=True,
        )
        for _when, invariant, text in kernel.K.problems:
            if invariant in (invariants.CRASH, invariants.BUG):
                print("     %s: %s" % (invariant, text))
                failed += 1
        world.forget_last()
    return failed
