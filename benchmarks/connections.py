"""How many connections PostgreSQL has under load."""

import concurrent.futures
import contextlib
import re
import time

from stack.commands import run as run_program
from stack.stack import ADDON
from stack.system import ensure_packages

from .contenders import SOON, new_stack, settle, start

TITLE = "Server connections under load, Odoo 19.0"
_WORKERS = 10
_CRON = 2
_IN_FLIGHT = 10
_WARM_UP = 3
_LOAD = ADDON / "benchmarks" / "load.lua"
_OTHER_ADDONS = ADDON / "tests" / "support" / "addons"
_MODULE = "other_listeners"
# The contenders with the addon -> how many direct connections so many instances have in the end.
_DIRECT = {"e": lambda count: 1, "e-own": lambda count: count * (1 + _CRON)}


def run(quick, tell):
    """Prefork mode with 10 HTTP workers, gevent with one websocket, and 2 cron workers for each instance. All instances
    work with one database of one cluster, behind one PgBouncer with a default_pool_size of 10. wrk keeps 10 requests
    under way at each instance: four of five have the database do something for 5 ms, one of five sends a message on the
    bus. "connections" is the highest number in pg_stat_activity during the load, without those of the benchmark;
    "direct" counts those that do not come from PgBouncer. Requests per second are the sum of all instances; "failed"
    requests are those that Odoo did not answer in 20 s. In (d) the database postgres has a pool of 400, since with a
    pool of 10 the eleventh listener would wait for ever. With this addon, all instances share a direct connection, or
    they have IMDISPATCHER_SHARE=0. They check themselves each 5 s, and the load begins when the number of direct
    connections has settled. No scheduled action is due. All instances share the CPUs of one machine, so more instances
    do not answer more requests.
    """
    ensure_packages("wrk")
    counts = (1, 2) if quick else (1, 2, 4, 8)
    for key in ("a", "e") if quick else ("a", "d", *_DIRECT):
        for count, row in _measure(key, counts, 3 if quick else 5):
            tell("%s: %d instance(s)" % (key, count))
            yield TITLE, {"contender": key, "instances": count, **row}


def _measure(key, counts, seconds):
    ours = key in _DIRECT
    first = new_stack(
        key,
        environment=SOON if ours else None,
        workers=_WORKERS,
        conf={"addons_path": ",".join(map(str, [ADDON, _OTHER_ADDONS][not ours :])), "max_cron_threads": _CRON},
        load="base,rpc,web,%s%s" % (_MODULE, ",bus_alt_connection" if ours else ""),
        jobs=False,
    )
    with contextlib.ExitStack() as exits:
        stacks = start([first], exits)
        first.client(["load"], listening=False)
        for count in counts:
            for stack in start([first.another() for _ in range(len(stacks), count)], exits):
                # The gevent process listens once it has a client.
                stack.client(["load"], listening=False)
                stacks.append(stack)
            # Workers load what they need with their first request.
            _under_load(stacks, _WARM_UP)
            if ours:
                settle(first, _DIRECT[key](count))
            yield count, _under_load(stacks, seconds)


def _under_load(stacks, seconds):
    """Have all of ``stacks`` answer requests for ``seconds``; return the figures of that time."""
    options = ["-t1", "-c%d" % _IN_FLIGHT, "-d%ds" % seconds, "--timeout", "20s", "-s", _LOAD]
    commands = [["wrk", *options, stack.odoo.http_url] for stack in stacks]
    seen = []
    with concurrent.futures.ThreadPoolExecutor(len(stacks)) as pool:
        loads = [pool.submit(run_program, command, timeout=seconds + 60) for command in commands]
        while not all(load.done() for load in loads):
            seen.append(_connections(stacks[0]))
            time.sleep(0.5)
    printed = "\n".join(load.result() for load in loads)
    if "Non-2xx or 3xx responses" in printed:
        raise RuntimeError("Odoo refuses requests of the load:\n%s" % stacks[0].odoo.log_tail())

    def total(pattern):
        return sum(map(float, re.findall(pattern, printed, re.MULTILINE)))

    return {
        **{what: max(each[what] for each in seen) for what in seen[0]},
        "requests/s": round(total(r"^Requests/sec:\s*([\d.]+)"), 1),
        "failed": int(total(r"timeout (\d+)")),
    }


def _connections(stack):
    """Return how many connections there are now, a dictionary."""
    connections = sum(row.application_name != "tests" for row in stack.server.activity())
    found = {"connections": connections, "direct": len(stack.direct_connections())}
    if stack.pooler:
        clients = (row for row in stack.pooler.show("clients") if row["database"] != "pgbouncer")
        found["clients of PgBouncer"] = sum(row["application_name"] != "tests" for row in clients)
    return found
