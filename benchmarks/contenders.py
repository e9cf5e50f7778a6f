"""What is compared: Odoo with this addon, and what people use instead, each with a PostgreSQL of its own."""

import concurrent.futures
import contextlib
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from stack.archive import CACHE, locked
from stack.commands import run
from stack.stack import Stack
from stack.waiting import wait_until

#: key -> what it is, behind PgBouncer unless it says otherwise; the order is that of all tables
NAMES = {
    "a": "stock Odoo, no pooler",
    "b": "stock Odoo",
    "c": "OCA's addon",
    "d": "stock Odoo, session pool",
    "e": "this addon",
    "e-users": "this addon, a user for each instance",
    "e-own": "this addon, not sharing",
    "e-direct": "this addon, no pooler",
    "floor": "bare psycopg2 client",
}

#: Cron workers go over to a gevent process of their host at their next check: what is counted once they have should not
#: have to wait for that for a minute.
SOON = {"IMDISPATCHER_CHECK_INTERVAL": "5"}
_NOT_SHARING = {"IMDISPATCHER_SHARE": "0"}
_SETTLED = 60.0

# For 14.0 none is published; that of 13.0 has the same code.
_OCA_REQUIREMENTS = {
    "14.0": "odoo13-addon-bus-alt-connection",
    "19.0": "odoo-addon-bus-alt-connection==19.0.*",
}


def new_stack(key, series, statements=False, pooler_settings=None, server_settings=None, environment=None, **options):
    """Return the :class:`Stack`, not started yet, of a contender.

    :param statements: whether the server logs every statement, which ``Stack.wait_for_listen`` needs; costs some time
    :param options: more arguments for :class:`Stack`
    """
    # Two rows of the table want many connections; none is to be refused for want of room.
    server = {"log_statement": "all" if statements else "none", "max_connections": 600, **(server_settings or {})}
    # The same pool for each database, and not a connection more.
    pooler = {
        "settings": {
            "max_client_conn": 2000,
            "default_pool_size": 10,
            "reserve_pool_size": 0,
            **(pooler_settings or {}),
        },
        "databases": {"postgres": ""},
    }
    addon = {}
    if key in "abd":
        addon["addon"] = None
    elif key == "c":
        addon["addon"] = oca_addon(series)
    if key == "d":
        # A session each for all that listen, and all that are sending: with the default of 10 the eleventh would wait.
        pooler["databases"]["postgres"] = "pool_mode=session pool_size=400"
    own = _NOT_SHARING if key == "e-own" else {}
    return Stack(
        series,
        pooler=key not in ("a", "e-direct"),
        server_options={"settings": server},
        pooler_options=pooler,
        environment={**(environment or {}), **own},
        **{**addon, **options},
    )


def start_more(stack, environments, exits):
    """Start an Odoo beside that of ``stack`` for each of these more ``environments``, two at a time.

    Return their stacks, see :meth:`Stack.another`; they end with ``exits``.
    """
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda variables: exits.enter_context(stack.another(**variables)), environments))


def settle(stack, count):
    """Return when there are ``count`` direct connections of this addon's; or after a minute, however many there are."""

    def settled():
        return len(stack.direct_connections()) == count

    with contextlib.suppress(TimeoutError):
        wait_until(settled, _SETTLED, interval=0.2)


@contextlib.contextmanager
def running(stacks):
    """Start all of ``stacks``, a dictionary, two at a time; all of them are ended with the block."""
    with contextlib.ExitStack() as exits:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            futures = {key: pool.submit(stack.__enter__) for key, stack in stacks.items()}
            concurrent.futures.wait(futures.values())
        for key, future in futures.items():
            if future.exception() is None:
                exits.push(stacks[key])
        for future in futures.values():
            future.result()
        yield stacks


def oca_addon(series):
    """Return the folder that holds the addon of the Odoo Community Association, downloading it if it is missing.

    :raise CommandError: it can not be had
    """
    folder = CACHE / ("oca-" + series)
    with locked("oca-" + series):
        if not folder.exists():
            with tempfile.TemporaryDirectory(prefix="oca-", dir=CACHE) as scratch:
                unpacked = Path(scratch) / "unpacked"
                for wheel in _download(_OCA_REQUIREMENTS[series], scratch):
                    with zipfile.ZipFile(wheel) as contents:
                        contents.extractall(unpacked)
                shutil.move(unpacked, folder)
    return folder / "odoo" / "addons"


def oca_version(series):
    """Return name and version of the package that :func:`oca_addon` gives."""
    (metadata,) = oca_addon(series).parents[1].glob("*.dist-info")
    return metadata.name[: -len(".dist-info")]


def _download(requirement, folder):
    # It is Odoo's Python that has to suit it, not ours.
    options = ["--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", "--ignore-requires-python"]
    run([sys.executable, "-m", "pip", "download", *options, "--dest", folder, requirement])
    return Path(folder).glob("*.whl")
