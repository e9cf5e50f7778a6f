"""Faults that take special conditions: one story each, in the same world, without chance.

A story is a function whose docstring says what has to hold. It returns ``(value, limit)``, and fails if the value is
above the limit. ``python -m tests.simulation --stories`` tells all of them.
"""

import math

from . import invariants, kernel
from .odoo import CRON, GEVENT, THREADED
from .world import World, forget

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
    world = World(addon, seed, kinds, keep_trace=True, **chosen)
    # A story judges for itself.
    world.late_limit = world.silent_limit = world.cron_limit = math.inf
    world.send()
    for kind in processes:
        world.start_odoo(kind)
        world.advance(apart)
    world.advance(settle)
    return world


def _late(world, since, databases=None, but=None):
    """Return by how much, in seconds, what was sent after ``since`` was late in any process ``but`` one.

    That is infinite if something, or everything, did not come.
    """
    found = []
    for process in world.odoos:
        if process is not but:
            found += world.watch.lateness(process, since, databases or world.databases)
    return max(found, default=math.inf)


def _cut(world):
    for link in list(world.direct_path.links):
        if not link.over:
            world.direct_path.cut(link)


def _break_direct_way(world):
    world.direct_path.refusing = True
    _cut(world)


def _leader(world):
    return next(process for process in world.odoos if world.direct_connections(process))


@_story
def locked_database_delays_no_other_while_polling(addon):
    """While bus_bus of one database of three is locked, polling looks up the others within poll_interval + 1 s."""
    # Few messages, since the addon delivers only so many in a second of what it has looked up.
    world = _begin(addon, [GEVENT], normal_rate=0.5)
    _break_direct_way(world)
    world.cluster.lock("d1")
    world.advance(60)
    since = world.now
    world.advance(300)
    return _late(world, since, ["d2", "d3"]), world.poll_interval + 1


@_story
def locked_databases_do_not_delay_checks(addon):
    """While bus_bus of a database is locked, a path that fails silently is noticed within check_interval."""
    worst = 0.0
    for moment in range(0, 40, 4):
        world = _begin(addon, [GEVENT], settle=30, check_interval=6)
        world.cluster.lock("d1")
        _cut(world)
        world.advance(20 + moment)
        since = world.now
        for link in world.direct_path.links:
            link.lose(silent=True)
        world.advance(100)
        worst = max(worst, _late(world, since, ["d2", "d3"]))
        forget()
    return worst, world.check_interval + 1


@_story
def leader_that_stands_still_is_left(addon):
    """While the leader stands still for 30 s, its followers, cron workers too, hear within 5 s."""
    worst = 0.0
    for kind in (GEVENT, CRON):
        world = _begin(addon, [kind] * 3)
        leader, since = _leader(world), world.now
        leader.stop()
        for second in range(8):
            world.after(second, world.trigger_cron)
        world.advance(30)
        leader.go_on()
        world.advance(60)
        worst = max(worst, _late(world, since, but=leader))
        forget()
    return worst, 5.5


@_story
def blocking_log_does_not_delay_the_reconnect(addon):
    """With a log handler that takes 8 s for each line, a lost listener hears again within a second."""
    # So much is sent, and connecting takes so long, that something is missed meanwhile and has to be looked up.
    world = _begin(addon, [GEVENT], normal_rate=20.0)
    world.direct_path.latency = 0.03
    _leader(world).log_seconds = 8.0
    since = world.now
    _cut(world)
    world.advance(60)
    return _late(world, since), 1.0


@_story
def path_that_is_cut_at_each_notification_is_not_flooded(addon):
    """A middlebox that cuts the connection at the first notification causes at most 20 connections in 10 s."""
    world = _begin(addon, [GEVENT], normal_rate=50.0, settle=10)
    world.watch.most_connects = 0

    def cut():
        for link in list(world.direct_path.links):
            if not link.over and link.server is not None:
                world.direct_path.cut(link)
        world.after(0.02, cut)

    cut()
    world.advance(30)
    return world.watch.most_connects, 20


@_story
def failover_to_a_server_behind_loses_nothing_while_polling(addon):
    """While polling, another server takes over that is behind, and passes the old mark before the next look-up."""
    world = _begin(addon, [GEVENT], normal_rate=0.2, poll_interval=5)
    _break_direct_way(world)
    world.advance(60)
    since = world.now
    for _failover in range(10):
        world.rate = 20.0
        world.cluster.stop(None)
        world.watch.forget_rows(world.cluster.lag_behind(3))
        world.start_server()
        world.advance(10)
        world.rate = 0.2
        world.advance(40)
    return _late(world, since) == math.inf, 0


@_story
def process_has_one_listener(addon):
    """Threads that open their cursors at the same time get one listener: no process connects twice (40 starts)."""
    most, options = 0, {"settle": 30, "apart": 0, "preemption": 0.1, "check_interval": 12, "share": False}
    for seed in range(40):
        world = _begin(addon, [THREADED], seed=seed, **options)
        most = max(most, len(world.direct_connections(world.odoos[0])))
        forget()
    return most, 1


@_story
def first_followers_of_a_leader_stay(addon):
    """If a listener becomes the leader while it listens, it serves its first followers (20 times)."""
    most = 0
    for seed in range(20):
        world = _begin(addon, [CRON] * 5, seed=seed, settle=4, apart=0.1, check_interval=3)
        leader = _leader(world)
        # While a child keeps the name bound, each of the others listens by itself.
        child = leader.fork()
        leader.kill()
        world.advance(5)
        before = len(world.watch.lines)
        child.kill()
        world.kernel.head_start = 0.5
        world.advance(5)
        most = max(most, sum("does not answer" in line for line in world.watch.lines[before:]))
        forget()
    return most, 0


@_story
def fork_does_not_keep_the_name(addon):
    """If a child of a killed leader holds copies of its descriptors, the others share a new leader nevertheless."""
    world = _begin(addon, [GEVENT, GEVENT, GEVENT, GEVENT])
    leader = _leader(world)
    leader.fork()
    leader.kill()
    world.advance(120)
    return sum(len(world.direct_connections(process)) for process in world.odoos), 1


@_story
def stale_primary_in_front_is_got_past(addon):
    """With a stale primary in front of the host list, the listener is at the right server after 25 s."""
    world = _begin(addon, [GEVENT], kinds=["stale_primary_first"], settle=25)
    return world.odoos[0].modes() != ["listening"], 0


@_story
def leader_out_of_descriptors_goes_on(addon):
    """A process without descriptors that loses its connection listens again once it has some."""
    world = _begin(addon, [GEVENT], check_interval=6)
    process = world.odoos[0]
    process.no_descriptors = True
    _cut(world)
    world.advance(120)
    process.no_descriptors = False
    world.advance(20)
    return process.modes() != ["listening"], 0


@_story
def self_check_wakes_a_hundred_listeners_rarely(addon):
    """100 listeners with a connection each are woken 15,000 times in their first hour, by 200 NOTIFYs at most.

    PostgreSQL wakes all that listen in the database. Each listener sends a NOTIFY when it begins; after that one a
    minute is enough for all of them. The first five minutes after the last beginning stand for the hour.
    """
    world = _begin(addon, [], normal_rate=1e-9, share=False, settle=0)
    world.cluster.most_backends = 300
    notify, woken = world.cluster.notify, []

    def counted(pid, database, channel, payload):
        woken.append(sum(backend.database == database and bool(backend.listens) for backend in world.cluster.backends))
        notify(pid, database, channel, payload)

    world.cluster.notify = counted
    for _listener in range(100):
        world.start_odoo(GEVENT)
        world.advance(0.2)
    first = len(woken)
    world.kernel.run(world.now + 300)
    hour = woken[:first] + 12 * woken[first:]
    return (sum(hour) if len(hour) <= 200 else math.inf), 15000


def tell(addon, names):
    """Tell the stories of ``names``, or all; return how many failed."""
    failed = 0
    for story in STORIES:
        if names and story.__name__ not in names:
            continue
        value, limit = story(addon)
        failed += value > limit
        verdict = "ok" if value <= limit else "FAIL"
        print("%-4s %-58s %8.3f, limit %g" % (verdict, story.__name__, value, limit), flush=True)
        for _when, invariant, text in kernel.K.problems:
            if invariant in (invariants.CRASH, invariants.BUG):
                print("     %s: %s" % (invariant, text))
                failed += 1
        forget()
    return failed
