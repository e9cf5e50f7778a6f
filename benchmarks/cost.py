"""What the addon costs when nothing happens."""

import contextlib
import datetime
import logging
import re
import statistics
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
addon, with its defaults, in one process without Odoo, on a cluster and a PgBouncer of their own; the NOTIFYs of an hour
follow from the mean time between two of the same listener in the log of the server, "-" if there were no two; CPU
seconds of all processes of PostgreSQL over the seconds that are named."""

_CHECK = re.compile(r"^(\S+ \S+) .*pg_notify.*'(bus_alt_connection_[0-9a-f]+)'", re.MULTILINE)


def run(quick, tell):
    keys = ("a", "e") if quick else ("a", "c", "e")
    with contextlib.ExitStack() as exits:
        tell("self-check, in the background")
        # Long enough for a whole round of checks, one each 55 s.
        checks = {
            count: exits.enter_context(_Checks(count, exits)) for count in ((0, 10) if quick else (0, 1, 10, 50, 100))
        }
        tell("idle")
        yield from _idle(keys, 15 if quick else 120)
        yield "self-check", {str(count): one.figures() for count, one in checks.items()}
    tell("start")
    yield "start", _start(keys, 1 if quick else 3)


def _idle(keys, seconds):
    stacks = {key: new_stack(key, "19.0", workers=2) for key in keys}
    with running(stacks):
        for stack in stacks.values():
            stack.client(["idle"], listening=False)
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
    """So many listeners that do nothing but check themselves."""

    def __init__(self, count, exits):
        self._count = count
        self._server = exits.enter_context(PostgreSQL({"max_connections": 400}))
        self._pooler = exits.enter_context(PgBouncer(self._server, settings={"max_client_conn": 1000}))
        self._process = None

    def __enter__(self):
        self._process = child.start("cost", self._count, self._server.port, self._pooler.port)
        if self._process.stdout.readline() != "all listen\n":
            raise RuntimeError("%d listeners do not all hear themselves" % self._count)
        self._began = time.monotonic()
        self._cpu = self._server_cpu()
        return self

    def figures(self):
        """Return what they have cost since they began."""
        passed = time.monotonic() - self._began
        times = {}
        for at, channel in _CHECK.findall(self._server.log()):
            at = datetime.datetime.strptime(at, "%Y-%m-%d %H:%M:%S.%f")
            times.setdefault(channel, []).append(at.timestamp())
        intervals = [(one[-1] - one[0]) / (len(one) - 1) for one in times.values() if len(one) > 1]
        return {
            "seconds": round(passed),
            "notifies": sum(map(len, times.values())),
            "interval": round(statistics.mean(intervals), 1) if intervals else None,
            "notifies_per_hour": round(self._count * 3600 / statistics.mean(intervals)) if intervals else None,
            "server_cpu_seconds_per_hour": round((self._server_cpu() - self._cpu) / passed * 3600, 1),
        }

    def __exit__(self, *exception):
        child.end(self._process)

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


def _listen(count, direct_port, pooler_port):
    from bus_alt_connection import settings
    from bus_alt_connection.catchup import Backlog
    from bus_alt_connection.connection import connect
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

    def ordinary(database):
        return connect(parameters(pooler_port, database))

    supervisors, feeds = [], []
    for _ in range(count):
        listener = Listener("postgres", direct, lambda: False, lambda event: None)
        feeds.append(_Everything(BUS_CHANNEL))
        listener.add(feeds[-1])
        supervisors.append(Supervisor(listener, ordinary, set(), Backlog(ordinary), settings.read({}, {})))
        for one in (listener, supervisors[-1]):
            threading.Thread(target=one.run, daemon=True).start()
    wait_until(lambda: all(one.mode == LISTENING for one in supervisors), 60, "all listeners")
    print("all listen", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    _listen(*map(int, sys.argv[1:]))
