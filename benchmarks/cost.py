"""What the addon costs when nothing happens."""

import contextlib
import datetime
import itertools
import logging
import re
import sys
import threading
import time
from pathlib import Path

import psutil

from stack.pgbouncer import PgBouncer
from stack.postgres import PostgreSQL

from . import child
from .contenders import new_stack, running
from .figures import spread

HOW = """\
Odoo 19.0. "idle": prefork with 2 workers, gevent and 1 cron worker, one websocket that nothing is sent to; CPU seconds
of all threads of all processes of Odoo, as the kernel's scheduler counts them, over the seconds that are named, times
what makes an hour of them. All contenders idle at the same time. "memory" after that: resident (RSS) and, which counts
no shared page, unique (USS) MiB of each kind of process, the mean where there are several. "start": seconds from the
start of Odoo, threaded, until it answers a request, the contenders taking turns. "self-check": as many listeners of the
addon, with its defaults but each with a connection of its own, in one process without Odoo, on a cluster and a
PgBouncer of their own, of which there are several where it is said, all at the same time. They are started one after
the other in 20 s, as instances are: those that begin at the same moment would look at the same moment for some minutes.
"first" is the NOTIFY of each when it begins; "heartbeats" those that came in the seconds that are named, on all
clusters together, by the log of the servers. One is enough for all listeners of a cluster; an hour's follow from the
mean time between two on the same cluster, "-" if there were no two. CPU seconds are those of all processes of one
PostgreSQL over the seconds that are named."""

_FIRST = re.compile(r"pg_notify.*'bus_alt_connection_[0-9a-f]+'")
_HEARTBEAT = re.compile(r"^(\S+ \S+) .*pg_notify.*'bus_alt_connection'", re.MULTILINE)
# Listeners, and on how many clusters so many.
_LISTENERS = {0: 1, 1: 2, 10: 2, 100: 4}


def run(quick, tell):
    keys = ("a", "e") if quick else ("a", "c", "e")
    with contextlib.ExitStack() as exits:
        tell("self-check, in the background")
        checks = {
            count: [exits.enter_context(_Checks(count, exits, 2 if quick else 20)) for _ in range(clusters)]
            for count, clusters in ({0: 1, 10: 1} if quick else _LISTENERS).items()
        }
        tell("idle")
        yield from _idle(keys, 15 if quick else 120, checks)
        tell("start")
        yield "start", _start(keys, 1 if quick else 3)
        yield "self-check", {str(count): _check_figures(count, clusters) for count, clusters in checks.items()}


def _check_figures(count, clusters):
    found = [one.figures() for one in clusters]
    gaps = [later - earlier for one in found for earlier, later in zip(one["heartbeats"], one["heartbeats"][1:])]
    interval = sum(gaps) / len(gaps) if gaps else None
    return {
        "clusters": len(clusters),
        "seconds": round(found[0]["seconds"]),
        "first": found[0]["first"],
        "heartbeats": sum(len(one["heartbeats"]) for one in found),
        "interval": interval and round(interval, 1),
        "notifies_per_hour": interval and round(found[0]["first"] + 3600 / interval),
        "server_cpu_seconds_per_hour": round(sum(one["cpu"] / one["seconds"] for one in found) / len(found) * 3600, 1),
    }


def _idle(keys, seconds, checks):
    stacks = {key: new_stack(key, "19.0", workers=2) for key in keys}
    with running(stacks):
        for stack in stacks.values():
            stack.client(["idle"], listening=False)
        for one in itertools.chain(*checks.values()):
            one.begin()
        began = {key: (time.monotonic(), _cpu(stack)) for key, stack in stacks.items()}
        time.sleep(seconds)
        idle, memory = {}, {}
        for key, stack in stacks.items():
            used, passed = _cpu(stack) - began[key][1], time.monotonic() - began[key][0]
            idle[key] = {"cpu_seconds_per_hour": round(used / passed * 3600, 1), "seconds": round(passed)}
            memory[key] = _memory(stack)
        yield "idle", idle
        yield "memory", memory


def _cpu(stack):
    main = psutil.Process(stack.odoo.pid)
    # psutil's own figures are rounded to 10 ms for each process, which is too coarse for a few minutes.
    return sum(
        int(schedstat.read_text().split()[0]) / 1e9
        for process in [main, *main.children(recursive=True)]
        for schedstat in Path("/proc/%d/task" % process.pid).glob("*/schedstat")
    )


def _memory(stack):
    processes = stack.odoo.processes()
    kinds = {
        "main": [processes.main],
        "http": processes.http,
        "cron": processes.cron,
        "gevent": [processes.gevent] if processes.gevent else [],
    }
    found = {}
    for kind, pids in kinds.items():
        infos = [psutil.Process(pid).memory_full_info() for pid in pids]
        if infos:
            found[kind] = {
                "rss": round(sum(info.rss for info in infos) / len(infos) / 2**20, 1),
                "uss": round(sum(info.uss for info in infos) / len(infos) / 2**20, 1),
            }
    return found


def _start(keys, times):
    stacks = {key: new_stack(key, "19.0") for key in keys}
    taken = {key: [] for key in keys}
    with running(stacks):
        for stack in stacks.values():
            stack.odoo.stop()
        for _ in range(times):
            for key, stack in stacks.items():
                began = time.monotonic()
                stack.odoo.start()
                taken[key].append(time.monotonic() - began)
                stack.odoo.stop()
    return {key: spread(seconds) for key, seconds in taken.items()}


class _Checks:
    """So many listeners that do nothing but check themselves, started one after the other in some seconds."""

    def __init__(self, count, exits, seconds):
        self._count = count
        self._seconds = seconds
        self._server = exits.enter_context(PostgreSQL({"max_connections": 400}))
        self._pooler = exits.enter_context(PgBouncer(self._server, settings={"max_client_conn": 1000}))
        self._process = None

    def __enter__(self):
        self._process = child.Child("cost", self._count, self._server.port, self._pooler.port, self._seconds)
        return self

    def begin(self):
        """Begin to count, when all listen."""
        if self._process.read() != "all listen\n":
            raise RuntimeError("%d listeners do not all hear themselves" % self._count)
        self._began = time.monotonic()
        self._mark = self._server.log_mark()
        self._cpu = self._server_cpu()

    def figures(self):
        """Return what they have cost since :meth:`begin`."""
        times = _HEARTBEAT.findall(self._server.log_since(self._mark))
        return {
            "seconds": time.monotonic() - self._began,
            "first": len(_FIRST.findall(self._server.log())),
            "heartbeats": [datetime.datetime.strptime(at, "%Y-%m-%d %H:%M:%S.%f").timestamp() for at in times],
            "cpu": self._server_cpu() - self._cpu,
        }

    def __exit__(self, *exception):
        self._process.close()

    def _server_cpu(self):
        main = psutil.Process(self._server.pid)
        total = 0.0
        for process in [main, *main.children()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                # Those of ended backends are with their parent.
                times = process.cpu_times()
                total += times.user + times.system
                if process is main:
                    total += times.children_user + times.children_system
        return total


class _Everything:
    """A feed that nobody reads."""

    def __init__(self, channel):
        self.channels = frozenset([channel])

    def put(self, notifications):
        return True


def _listen(count, direct_port, pooler_port, seconds):
    from bus_alt_connection import settings
    from bus_alt_connection.catchup import Backlog, Databases
    from bus_alt_connection.connection import connect, opening
    from bus_alt_connection.listener import DirectSession, Listener
    from bus_alt_connection.payload import BUS_CHANNEL
    from bus_alt_connection.supervisor import LISTENING, Supervisor
    from stack.postgres import PASSWORD, USER
    from stack.waiting import wait_until

    logging.disable(logging.CRITICAL)

    def parameters(port, database):
        login = {"user": USER, "password": PASSWORD, "dbname": database}
        return {"host": "127.0.0.1", "port": port, **login}

    def direct():
        return connect(parameters(direct_port, "postgres"), DirectSession)

    def pooled(database):
        return opening(parameters(pooler_port, database))

    supervisors, feeds = [], []
    for _ in range(count):
        time.sleep(seconds / count)
        listener = Listener("postgres", direct, lambda: False, lambda event: None)
        feeds.append(_Everything(BUS_CHANNEL))
        listener.add(feeds[-1])
        supervisors.append(Supervisor(listener, pooled, Databases(), Backlog(pooled), settings.read({}, {})))
        for one in (listener, supervisors[-1]):
            threading.Thread(target=one.run, daemon=True).start()
    wait_until(lambda: all(one.mode == LISTENING for one in supervisors), 60, "all listeners")
    print("all listen", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    _listen(*map(int, sys.argv[1:]))
