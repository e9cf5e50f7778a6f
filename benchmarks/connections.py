"""How many connections PostgreSQL has to keep, under load."""

import concurrent.futures
import contextlib
import re
import threading

from stack.commands import run as run_program
from stack.stack import ADDON
from stack.system import ensure_packages

from .contenders import SOON, new_stack, settle, start_more

HOW = """\
Odoo 19.0, prefork: 10 HTTP workers, gevent with one websocket, 2 cron workers for each instance; all instances on one
database of one cluster, behind one PgBouncer. wrk keeps 10 requests under way at each instance: four of five ask the
database something that takes it 5 ms, one of five sends on the bus. Connections are those in pg_stat_activity, of all
clients but the measuring one, the most that were seen while the load lasted; direct are those that do not come from
PgBouncer. Requests per second are the sum of all instances. PgBouncer's default_pool_size is 10 but where another is
named. (d) gives the database postgres a pool of 400, since with 10 the eleventh of those that listen would wait
for ever. With this addon all instances share a direct connection, the listeners of all being of one user; or those of
each instance have a user of the database of their own, and share one for each; or they have IMDISPATCHER_SHARE=0. The
load begins when they have settled, for which they check themselves each 5 s. No scheduled action is due. All instances
share the CPUs of one machine: more of them serve no more requests."""

_WORKERS = 10
_CRON = 2
_IN_FLIGHT = 10
_WARM_UP = 3
_LOAD = ADDON / "benchmarks" / "load.lua"
_OTHER_ADDONS = ADDON / "tests" / "support" / "addons"
_MODULE = "other_listeners"
# The contenders with the addon, and how many direct connections so many instances are to settle on.
_DIRECT = {"e": lambda count: 1, "e-users": lambda count: count, "e-own": lambda count: count * (1 + _CRON)}


def run(quick, tell):
    ensure_packages("wrk")
    instances = (1,) if quick else (1, 2, 4, 8)
    seconds = 3 if quick else 5
    for key in ("a", "e") if quick else ("a", "d", *_DIRECT):
        figures = {}
        try:
            # What users of their own come to needs no curve.
            counts = instances[-1:] if key == "e-users" else instances
            for name, found in _measure(key, counts, (2,) if quick else (2, 4), seconds, tell):
                figures[name] = found
        except Exception as error:  # what there is so far is worth keeping
            figures["failed"] = "%s: %s" % (type(error).__name__, str(error).split("\n")[0])
        yield key, figures


def _measure(key, instances, small_pools, seconds, tell):
    pools = small_pools if key == "e" else ()
    ours = key in _DIRECT
    stack = new_stack(
        key,
        "19.0",
        workers=_WORKERS,
        conf={"addons_path": ",".join(map(str, [ADDON, _OTHER_ADDONS][not ours :])), "max_cron_threads": _CRON},
        load="base,rpc,web,%s%s" % (_MODULE, ",bus_alt_connection" if ours else ""),
        environment=SOON if ours else None,
        # Each cron worker that is at a job holds one connection and wants another: too many for the smallest pool.
        jobs=False,
        pooler_settings={"default_pool_size": pools[0]} if pools else None,
    )
    with contextlib.ExitStack() as exits:
        exits.enter_context(stack)
        stacks = [stack]
        # It has the gevent process listen.
        stack.client(["load"], listening=False)
        _load(stacks, _WARM_UP)
        # From small to large, since a pool does not shrink at once.
        for size in pools:
            stack.pooler.settings["default_pool_size"] = size
            stack.pooler.reload()
            tell("%s: 1 instance, pool of %d" % (key, size))
            yield "pool %d" % size, _under_load(stacks, seconds)
        if pools:
            stack.pooler.settings["default_pool_size"] = 10
            stack.pooler.reload()
        for count in instances:
            tell("%s: %d instance(s)" % (key, count))
            numbers = range(len(stacks), count)
            environments = [_user(stack, number) if key == "e-users" else {} for number in numbers]
            for one in start_more(stack, environments, exits):
                one.client(["load"], listening=False)
                stacks.append(one)
            # Workers load what they need with their first request.
            _load(stacks, _WARM_UP)
            if ours:
                settle(stack, _DIRECT[key](count))
            yield "%d instances" % count, _under_load(stacks, seconds)


def _user(stack, number):
    """Return the variables for listeners with a user of the database of their own, and make that."""
    name, password = "listener_%d" % number, "s3cret"
    stack.server.execute("CREATE ROLE %s LOGIN PASSWORD %%s" % name, (password,))
    return {"IMDISPATCHER_DB_USER": name, "IMDISPATCHER_DB_PASSWORD": password}


def _under_load(stacks, seconds):
    with _Watch(stacks[0]) as watch:
        printed = _load(stacks, seconds)

    def numbers(pattern):
        return [float(found) for text in printed for found in re.findall(pattern, text, re.MULTILINE)]

    total, direct = watch.most
    return {
        "connections": total,
        "direct": direct,
        "clients_of_pgbouncer": watch.clients,
        "requests_per_second": round(sum(numbers(r"^Requests/sec:\s*([\d.]+)")), 1),
        "errors": int(sum(numbers(r"Non-2xx or 3xx responses: (\d+)"))),
        "timeouts": int(sum(numbers(r"timeout (\d+)"))),
        "seconds": seconds,
    }


def _load(stacks, seconds):
    """Have the Odoo of each of ``stacks`` answer requests for so long; return what each wrk has printed."""
    options = ["-t1", "-c%d" % _IN_FLIGHT, "-d%ds" % seconds, "--timeout", "20s", "-s", str(_LOAD)]
    commands = [["wrk", *options, stack.odoo.http_url] for stack in stacks]
    with concurrent.futures.ThreadPoolExecutor(len(stacks)) as pool:
        return list(pool.map(lambda command: run_program(command, timeout=seconds + 60), commands))


class _Watch:
    """Looks at the connections as long as its block lasts."""

    def __init__(self, stack):
        #: the most seen at once: all, and of them direct ones
        self.most = (0, 0)
        self.clients = None
        self._stack = stack
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._done.set()
        self._thread.join()

    def _run(self):
        while not self._done.wait(0.5):
            pooled = self._ports()
            rows = [row for row in self._stack.server.activity() if row.application_name != "tests"]
            pooled |= self._ports()
            direct = sum(row.client_port not in pooled for row in rows)
            self.most = max(self.most, (len(rows), direct))
            if self._stack.pooler:
                clients = sum(
                    row["database"] != "pgbouncer" and row["application_name"] != "tests"
                    for row in self._stack.pooler.show("clients")
                )
                self.clients = max(self.clients or 0, clients)

    def _ports(self):
        return self._stack.pooler.server_ports() if self._stack.pooler else set()
