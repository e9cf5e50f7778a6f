"""What is compared: Odoo with this addon, and what people use instead, each with a PostgreSQL of its own."""

import concurrent.futures
import contextlib
import sys
import time

import psycopg2

from stack.archive import kept
from stack.commands import run
from stack.stack import ADDON, Stack
from stack.waiting import wait_until

SERIES = "19.0"
#: key -> what it is, behind PgBouncer unless it says otherwise; the order is that of all tables
NAMES = {
    "a": "stock Odoo, no pooler",
    "c": "OCA's addon",
    "d": "stock Odoo, session pool",
    "e": "this addon",
    "e-own": "this addon, not sharing",
    "e-direct": "this addon, no pooler",
    "floor": "one bare listener",
}

#: A cron worker moves to the leader of its machine at its next check. A benchmark does not wait a minute for that.
SOON = {"IMDISPATCHER_CHECK_INTERVAL": "5"}
_SETTLED = 60.0
_OCA_REQUIREMENT = "odoo-addon-bus-alt-connection==19.0.*"


def name(key):
    """Return what a contender is called in tables."""
    return "(%s) %s" % (key, NAMES[key]) if len(key) == 1 else NAMES.get(key, key)


def new_stack(key, statements=False, environment=None, **options):
    """Return the :class:`Stack` of a contender, not started yet.

    :param statements: whether the server logs every statement, which ``Stack.wait_for_listen`` needs
    :param options: more arguments for :class:`Stack`
    """
    # Enough for eight instances without a pooler.
    server = {"log_statement": "all" if statements else "none", "max_connections": 600}
    # Every database has a pool of the same size.
    pooler = {"max_client_conn": 2000, "default_pool_size": 10, "reserve_pool_size": 0}
    # Each listener and each sender takes a session: with a pool of 10 the eleventh would wait for ever.
    postgres = "pool_mode=session pool_size=400" if key == "d" else ""
    if key == "c":
        addon, environment = oca_addon(), _oca_address
    else:
        addon = None if key in ("a", "d") else ADDON
        environment = {**(environment or {}), **({"IMDISPATCHER_SHARE": "0"} if key == "e-own" else {})}
    return Stack(
        SERIES,
        addon=addon,
        pooler=key not in ("a", "e-direct"),
        server_options={"settings": server},
        pooler_options={"settings": pooler, "databases": {"postgres": postgres}},
        environment=environment,
        **options,
    )


def start(managers, exits):
    """Enter these context managers, two at a time; return what they give. They end with ``exits``."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(exits.enter_context, managers))


def settle(stack, count):
    """Return when this addon has ``count`` direct connections; or after a minute, however many it has."""
    with contextlib.suppress(TimeoutError):
        wait_until(lambda: len(stack.direct_connections()) == count, _SETTLED, interval=0.2)


def wait_for_push(stack, channel, client, deadline=60):
    """Send messages to ``channel`` until one of them arrives at ``client``; the server may be away meanwhile."""

    def one_arrives():
        message = "proof %f" % time.monotonic()
        with contextlib.suppress(TimeoutError, psycopg2.Error):
            stack.send(channel, message)
            return client.wait_for(message, 0.5)

    wait_until(one_arrives, deadline, "the first push", 0.1, stack.odoo.log_tail)


def oca_addon():
    """Return the folder that holds the addon of the Odoo Community Association; get it if it is missing.

    :raise CommandError: it cannot be had
    """

    def install(folder):
        # The package has to suit Odoo's Python, not this one.
        options = ["--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", "--ignore-requires-python"]
        run([sys.executable, "-m", "pip", "install", *options, "--target", folder, _OCA_REQUIREMENT])

    return kept("oca-19.0", install) / "odoo" / "addons"


def _oca_address(stack):
    """Return the variables that tell the addon of the Odoo Community Association where PostgreSQL is."""
    return {"ODOO_IMDISPATCHER_DB_HOST": stack.server.host, "ODOO_IMDISPATCHER_DB_PORT": str(stack.server.port)}


def oca_version():
    """Return name and version of the package that :func:`oca_addon` gives."""
    (metadata,) = oca_addon().parents[1].glob("*.dist-info")
    return metadata.stem
