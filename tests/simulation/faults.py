"""The kinds of faults. Each function begins one and returns how it ends, or None if it needs no end.

A kind says how late a message may be because of it, and from when on that counts: ``SENT``, or ``OVER`` for the end
of the fault. ``together`` is what counts if there are other faults at the same time.
"""

import collections
import contextlib
import functools
import math
import socket

from . import kernel, odoo, pooler, postgres
from .machine import Process, Socket
from .network import Path

SENT, OVER = "sent", "over"
# How late a message may be.
AT_ONCE, POLLED, CHECKED, LEFT = "at once", "polled", "checked", "left"
RECONNECTED, READ, CUT = "reconnected", "read", "cut"

_GARBAGE = '{"a":1}', "x", "[]", "[1]", '[{"a":1}]', "[[]]", '["\\ud800"]', "[" * 2000
_GARBAGE_TO_LEADERS = b"", b"\xff", b"{}", b"[null]", b'["imbus"]', b'["\\ud800"]', b"[" * 100000, b'["imbus"'
_ADMIN = "terminating connection due to administrator command"

#: ``late``: a word above; ``judged``: from when on; ``late_together`` and ``together``: the same with other faults;
#: ``cause``: what the log may say of it, see `invariants`; ``is_setting``: whether it holds during the whole run
Kind = collections.namedtuple("Kind", "name begin late judged late_together together cause is_setting")

#: all kinds by name
KINDS = {}


def limit(late, world):
    """Return the seconds that a word for lateness means."""
    spread = world.seconds_of_portions()
    return {
        AT_ONCE: 1.0,
        # Rows are looked up once; after an outage twice.
        CUT: 1.0 + spread / 2,
        LEFT: 6.0 + spread,
        POLLED: world.poll_interval + 4.0 + spread,
        RECONNECTED: 8.0 + spread,
        # A look-up under way, and the delay until the next one.
        READ: 40.0 + spread,
        CHECKED: world.check_interval + 3.0 + spread,
    }[late]


def _kind(late, judged=SENT, late_together=None, together=OVER, cause=None, is_setting=False):
    def register(function):
        name = function.__name__
        KINDS[name] = Kind(name, function, late, judged, late_together or late, together, cause, is_setting)
        return function

    return register


def _kind_of_process(late, together=SENT, **judgement):
    """A kind of fault that a process has: the function gets that in place of the world, and is not called without."""

    def register(function):
        @functools.wraps(function)
        def begin(world):
            process = _victim(world)
            return process and function(process)

        return _kind(late, together=together, **judgement)(begin)

    return register


# The direct way, and the other one


@_kind(POLLED, together=SENT)
def direct_way_refuses(world):
    """Nothing answers there, and what was connected is cut."""
    path = world.direct_path
    path.refusing = True
    _cut_all(world, path, 0.9)
    return path.heal


# What is lost for another reason cannot be replaced meanwhile.
@_kind(AT_ONCE, late_together=POLLED, together=SENT)
def direct_way_is_full(world):
    path = world.direct_path
    path.full = True
    return path.heal


@_kind(CHECKED, together=SENT, cause="silent")
def direct_way_swallows(world):
    return _swallow(world.direct_path)


@_kind(CHECKED, together=SENT, cause="silent")
def direct_way_is_slow(world):
    return _slow_down(world, world.direct_path)


@_kind(CUT, together=SENT)
def direct_way_is_cut(world):
    _cut_all(world, world.direct_path, 0.9)


@_kind(CHECKED, together=SENT, cause="silent")
def connections_die_silently(world):
    """Those that exist are dead for good; later ones work."""
    silent = world.rng.random() < 0.7
    for link in list(world.direct_path.links):
        if not link.over and world.rng.random() < 0.8:
            link.lose(silent)


@_kind(AT_ONCE)
def pooler_way_refuses(world):
    path = world.paths["pooler"]
    path.refusing = True
    if world.rng.random() < 0.5:
        _cut_all(world, path, 0.9)
    return path.heal


@_kind(AT_ONCE)
def pooler_way_swallows(world):
    return _swallow(world.paths["pooler"])


@_kind(AT_ONCE)
def pooler_way_is_slow(world):
    return _slow_down(world, world.paths["pooler"])


def _swallow(path):
    path.swallow()
    return path.heal


def _slow_down(world, path):
    path.latency = world.rng.choice((0.05, 0.6, 3))
    return path.heal


def _have_looked_up(world):
    """Cut all connections that listen. They come back at once, but each process looks up what it missed."""
    _cut_all(world, world.direct_path, 1)


def _holds(thing, attribute, value=True, afterwards=False):
    """Set an attribute of ``thing``; return how that ends."""
    setattr(thing, attribute, value)
    return lambda: setattr(thing, attribute, afterwards)


def _cut_all(world, path, share):
    for link in list(path.links):
        if not link.over and world.rng.random() < share:
            path.cut(link)


# The pooler


@_kind(AT_ONCE)
def pooler_is_away(world):
    world.pooler.cut()
    return _holds(world.pooler, "away")


@_kind(AT_ONCE)
def pooler_hangs(world):
    world.pooler.hanging = True

    def end():
        world.pooler.hanging = False
        world.pooler.serve()

    return end


@_kind(AT_ONCE)
def pooler_is_full(world):
    return _holds(world.pooler, "full")


@_kind(AT_ONCE, together=SENT)
def database_is_disabled(world):
    """The pooler refuses one database."""
    name = world.rng.choice(world.databases)
    world.pooler.disabled.add(name)
    world.answering_since[name] = math.inf
    for client in list(world.pooler.clients):
        if client.database == name:
            client.drop()

    def end():
        world.pooler.disabled.discard(name)
        _answers_again(world, name)

    return end


def _answers_again(world, name):
    # What could not be looked up is tried again after 10 s at most.
    world.answering_since[name] = world.now + 10


# The server


@_kind(AT_ONCE, together=SENT)
def bus_is_locked(world):
    """A module update holds an ACCESS EXCLUSIVE lock on bus_bus of one database, or of several."""
    number = world.rng.randint(1, max(len(world.databases) // 3, 1))
    names = world.rng.sample(world.databases, number)
    _have_looked_up(world)
    for name in names:
        world.cluster.lock(name)
        world.answering_since[name] = math.inf

    def end():
        for name in names:
            world.cluster.unlock(name)
            _answers_again(world, name)

    return end


@_kind(READ, judged=OVER)
def look_ups_are_slow(world):
    _have_looked_up(world)
    return _holds(world.cluster, "slow_look_up", world.rng.choice((1, 10, 40)), 0.0)


@_kind(CUT, together=SENT)
def backend_is_terminated(world):
    found = [backend for backend in world.cluster.backends if backend.is_direct or world.rng.random() < 0.2]
    if found:
        world.rng.choice(found).terminate(_ADMIN)


@_kind(RECONNECTED, judged=OVER)
def server_restarts(world):
    if not world.cluster.up:
        return None
    world.cluster.stop(world.rng.choice((_ADMIN, None)))
    return world.start_server


@_kind(CHECKED, judged=OVER, cause="silent")
def server_restarts_silently(world):
    """The machine dies: no connection is told so, except for the pooler's."""
    if not world.cluster.up:
        return None
    world.cluster.stop(None, silently=True)
    return _start_now_or_later(world)


def _start_now_or_later(world):
    if world.rng.random() < 0.5:
        world.start_server()
        return None
    return world.start_server


@_kind(CHECKED, judged=OVER, cause="silent")
def fails_over(world):
    """Another server takes over, which may lack what was committed last."""
    if not world.cluster.up or world.server.former:
        return None
    world.cluster.stop(None, silently=world.rng.random() < 0.5)
    world.watch.forget_rows(world.cluster.lag_behind(world.rng.choice((0.0, 0.5, 5, 30))))
    return _start_now_or_later(world)


@_kind(CHECKED, judged=OVER, cause="split")
def old_primary_stays(world):
    """Another server takes over, but the direct way still leads to the former one."""
    if not world.cluster.up or world.server.former:
        return None
    world.server.former = world.cluster.left_behind()
    world.cluster.stop(None)
    world.watch.forget_rows(world.cluster.lag_behind(world.rng.choice((0.0, 0.5, 5))))
    world.start_server()

    def end():
        former, world.server.former = world.server.former, None
        if former:
            former.stop(world.rng.choice((None, _ADMIN)))

    return end


@_kind(POLLED, together=SENT, cause="standby")
def standby(world):
    """The direct way leads to a standby, and everybody there is let go."""
    end = _holds(world.cluster, "standby")
    for backend in list(world.cluster.backends):
        if backend.is_direct:
            backend.terminate(_ADMIN)
    return end


@_kind(AT_ONCE, together=SENT)
def database_is_added(world):
    if len(world.databases) < 12:
        world.add_database()


# Processes


@_kind_of_process(LEFT)
def process_is_killed(process):
    process.kill()
    process.world.replace_later(process, process.world.rng.choice((0, 0.1, 5)))


@_kind_of_process(LEFT)
def process_ends(process):
    """A process is told to end: its loops close their cursors. Another one takes its place."""
    process.ends = True
    process.world.after(6, process.kill)
    process.world.replace_later(process, process.world.rng.choice((6, 10)))


@_kind_of_process(LEFT)
def fork_outlives_process(process):
    """A process is killed while a child of it, forked without exec, holds copies of its descriptors."""
    child = process.fork()
    process.world.after(process.world.rng.choice((0, 0.5, 5)), process.kill)
    process.world.replace_later(process, 6)
    return child.kill


@_kind_of_process(AT_ONCE)
def process_forks(process):
    return process.fork().kill


@_kind_of_process(LEFT)
def process_is_replaced(process):
    """Another one begins before this one ends."""
    process.world.start_odoo(process.kind)
    process.world.after(process.world.rng.choice((0, 0.1, 3)), process.kill)


@_kind_of_process(LEFT)
def process_stands_still(process):
    """All its threads stop: SIGSTOP, or a call of C code that keeps the interpreter."""
    process.stop()
    return process.go_on


@_kind_of_process(LEFT)
def loops_are_busy(process):
    """Odoo's loops do something else for a while; in a gevent process nothing else runs either."""
    if process.kind == odoo.GEVENT:
        process.stop()
        return process.go_on
    until = process.world.now + process.world.rng.expovariate(1 / 20)
    process.busy.update(dict.fromkeys(odoo.LOOPS, until))
    return None


@_kind_of_process(AT_ONCE)
def loops_reopen(process):
    process.reopens.update(odoo.LOOPS)


@_kind(RECONNECTED, judged=OVER)
def machine_sleeps(world):
    for process in world.odoos:
        process.stop()
    return lambda: [process.go_on() for process in list(world.odoos)]


@_kind_of_process(AT_ONCE, late_together=RECONNECTED, together=OVER)
def no_descriptors_left(process):
    return _holds(process, "no_descriptors")


@_kind_of_process(AT_ONCE)
def no_threads_left(process):
    return _holds(process, "no_threads")


# The line about an outage is written while the outage lasts. Look-ups wait until the handler returns.
@_kind_of_process(AT_ONCE, late_together=RECONNECTED)
def log_blocks(process):
    """Each line of the log takes the thread that writes it 8 s."""
    return _holds(process, "log_seconds", 8.0, 0.0)


@_kind(AT_ONCE, together=SENT)
def garbage_is_sent(world):
    """Somebody notifies the bus of what Odoo cannot read."""
    if world.cluster.up:
        for payload in _GARBAGE:
            world.cluster.notify(1, "postgres", odoo.BUS_CHANNEL, payload)


@_kind(AT_ONCE, together=SENT)
def garbage_to_leaders(world):
    """Another program of the same user follows each leader, sends it garbage, and reads nothing."""
    for machine in range(world.machines):
        intruder = Process("intruder", machine=machine)
        kernel.Task(intruder, _send_garbage, (world, machine), "intruder")
        world.after(world.rng.choice((1, 20)), intruder.kill)


def _send_garbage(world, machine):
    for name in [name for number, name in kernel.K.socket_names if number == machine]:
        for _follower in range(world.rng.choice((1, 50))):
            with contextlib.suppress(OSError):
                follower = Socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                follower.settimeout(1)
                follower.connect(name)
                follower.send(world.rng.choice(_GARBAGE_TO_LEADERS))
    kernel.K.wait([], kernel.K.now + 30)


@_kind(AT_ONCE)
def flood(world):
    return _holds(world, "rate", 8.0, world.normal_rate)


def _victim(world):
    """Return a process, more often than not one with a direct connection; None if there is none."""
    leaders = [process for process in world.odoos if world.direct_connections(process)]
    found = leaders if leaders and world.rng.random() < 0.7 else world.odoos
    return world.rng.choice(found) if found else None


# Settings: they hold during the whole run


@_kind(POLLED, together=SENT, is_setting=True)
def direct_way_is_a_pooler(world):
    """Nobody has set IMDISPATCHER_DB_HOST, or it leads to a pooler in transaction mode."""
    if world.rng.random() < 0.5:
        world.environ.pop("IMDISPATCHER_DB_HOST")
    _lead_to_pooler(world, world.pooler)


@_kind(AT_ONCE, together=SENT, is_setting=True)
def pooler_keeps_sessions(world):
    """The direct way leads to a pooler in session mode."""
    _lead_to_pooler(world, pooler.Pooler(20, pooler.SESSION))


@_kind(AT_ONCE, together=SENT, is_setting=True)
def pooler_knows_listen(world):
    """The direct way leads to a pooler like PgDog."""
    _lead_to_pooler(world, pooler.Pooler(5, pooler.PGDOG))


def _lead_to_pooler(world, target):
    world.direct = "%s pooler" % target.mode
    world.paths["direct"].target = target


@_kind(CHECKED, together=SENT, cause="split", is_setting=True)
def stale_primary_first(world):
    """The host list begins with a former primary that is still up."""
    stale = postgres.Server()
    stale.former = postgres.Cluster(world.databases)
    stale.former.started = 500000
    world.paths["stale"] = Path("stale", stale)
    world.environ["IMDISPATCHER_DB_HOST"] = "stale,direct"


@_kind(AT_ONCE, together=SENT, is_setting=True)
def many_databases(world):
    while len(world.databases) < 10:
        world.add_database()
