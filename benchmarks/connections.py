"""How many connections PostgreSQL has to keep, under load."""

import concurrent.futures
import contextlib
import re
import threading

from stack.clients import WebsocketClient
from stack.commands import run as run_program
from stack.odoo import Odoo
from stack.stack import ADDON
from stack.system import ensure_packages

from .contenders import new_stack, oca_addon

HOW = """\
Odoo 19.0, prefork: 10 HTTP workers, gevent with one websocket, 2 cron workers for each instance; all instances on one
database of one cluster, behind one PgBouncer. wrk keeps 10 requests under way at each instance: four of five ask the
database something that takes it 5 ms, one of five sends on the bus. Connections are those in pg_stat_activity, of all
clients but the measuring one, the most that were seen while the load lasted; direct are those that do not come from
PgBouncer. Requests per second are the sum of all instances. PgBouncer's default_pool_size is 10 but where another is
named. (d) gives the database postgres a pool of 400, since with 10 the eleventh of those that listen would wait
for ever. All instances share the CPUs of one machine: more of them serve no more requests."""

_WORKERS = 10
_CRON = 2
_IN_FLIGHT = 10
_WARM_UP = 3
_LOAD = ADDON / "benchmarks" / "load.lua"
_OTHER_ADDONS = ADDON / "tests" / "support" / "addons"
_MODULE = "other_listeners"


def run(quick, tell):
    ensure_packages("wrk")
    instances = (1,) if quick else (1, 2, 4, 8)
    seconds = 3 if quick else 5
    for key in ("a", "e") if quick else ("a", "d", "e"):
        figures = {}
        try:
            for name, found in _measure(key, instances, (2,) if quick else (2, 4), seconds, tell):
                figures[name] = found
        except Exception as error:  # what there is so far is worth keeping
            figures["failed"] = "%s: %s" % (type(error).__name__, str(error).split("\n")[0])
        yield key, figures


def _measure(key, instances, small_pools, seconds, tell):
    pools = small_pools if key == "e" else ()
    stack = new_stack(
        key,
        "19.0",
        workers=_WORKERS,
        conf=_conf(key),
        load="base,rpc,web,%s%s" % (_MODULE, "" if key in "abd" else ",bus_alt_connection"),
        pooler_settings={"default_pool_size": pools[0]} if pools else None,
    )
    with contextlib.ExitStack() as exits:
        exits.enter_context(stack)
        odoos = [stack.odoo]
        exits.enter_context(_client(stack, stack.odoo))
        _load(odoos, _WARM_UP)
        # From small to large, since a pool does not shrink at once.
        for size in pools:
            stack.pooler.settings["default_pool_size"] = size
            stack.pooler.reload()
            tell("%s: 1 instance, pool of %d" % (key, size))
            yield "pool %d" % size, _under_load(stack, odoos, seconds)
        if pools:
            stack.pooler.settings["default_pool_size"] = 10
            stack.pooler.reload()
        for count in instances:
            tell("%s: %d instance(s)" % (key, count))
            more = [_another(stack) for _ in range(count - len(odoos))]
            for odoo in more:
                exits.callback(odoo.close)
            with concurrent.futures.ThreadPoolExecutor(2) as pool:
                odoos += pool.map(Odoo.start, more)
            for odoo in more:
                exits.enter_context(_client(stack, odoo))
            # Workers load what they need with their first request.
            _load(odoos, _WARM_UP)
            yield "%d instances" % count, _under_load(stack, odoos, seconds)


def _conf(key):
    addons = {"c": [oca_addon("19.0")] if key == "c" else [], "e": [ADDON]}.get(key, [])
    return {"addons_path": ",".join(map(str, [*addons, _OTHER_ADDONS])), "max_cron_threads": _CRON}


def _client(stack, odoo):
    """Return a client that has the gevent process of ``odoo`` listen."""
    client = WebsocketClient(
        odoo.http_url, odoo.event_url, stack.database, websocket_version=stack.build.websocket_version
    )
    client.subscribe(["load"], stack.last_id())
    return client


def _another(stack):
    first = stack.odoo
    return Odoo(
        stack.build,
        stack.pooler or stack.server,
        stack.database,
        workers=_WORKERS,
        addon=first.addon,
        load=first.load,
        environment=first.variables,
        conf=first.conf,
    )


def _under_load(stack, odoos, seconds):
    with _Watch(stack) as watch:
        printed = _load(odoos, seconds)

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


def _load(odoos, seconds):
    """Have all of ``odoos`` answer requests for so long; return what each wrk has printed."""
    options = ["-t1", "-c%d" % _IN_FLIGHT, "-d%ds" % seconds, "--timeout", "20s", "-s", str(_LOAD)]
    with concurrent.futures.ThreadPoolExecutor(len(odoos)) as pool:
        return list(pool.map(lambda odoo: run_program(["wrk", *options, odoo.http_url], timeout=seconds + 60), odoos))


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
