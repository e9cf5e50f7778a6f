"""The services of ``demo/compose.yaml`` in containers, and what clients outside of the containers see."""

import contextlib
import functools
import os
import re
import shlex
import types
import uuid

import psycopg2

from stack.archive import CACHE
from stack.clients import Client
from stack.commands import run
from stack.odoo import Odoo, http_session
from stack.sender import BusSender, Flow
from stack.waiting import wait_until

FOLDER = CACHE / "containers"
PROJECT = "bus_alt_connection"
NETWORK = PROJECT + "_default"
IMAGE = "localhost/%s_odoo" % PROJECT
DATABASE = "odoo"
#: Containers of services.
DB, POOLER, ODOO = ("%s_%s_1" % (PROJECT, service) for service in ("db", "pgbouncer", "odoo"))
SECOND_ODOO = PROJECT + "_odoo_2"
ADDONS = "/usr/lib/python3/dist-packages/odoo/addons/"


def podman(*arguments, **options):
    """Run podman and return what it prints."""
    return run(["podman", *arguments], **options).strip()


def compose(*arguments, **variables):
    """Run podman-compose on the file of the clone, with these variables in its environment."""
    command = ["/usr/bin/podman-compose", "-p", PROJECT, "-f", FOLDER / "clone" / "demo" / "compose.yaml"]
    return run([*command, *arguments], env={**os.environ, **variables})


def address(name):
    """Return the address of a container."""
    return podman("inspect", "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", name)


def address_of_pod(name):
    """Return the address of a pod."""
    return address(podman("pod", "inspect", "--format", "{{.InfraContainerID}}", name))


def odoo_at(host, port=8069, event_port=None):
    """Return what a :class:`Client` has to know of an Odoo, once it answers.

    :param event_port: of the gevent process; None if Odoo runs threaded
    """
    build = types.SimpleNamespace(series="19.0", websocket_version=_websocket_version())
    urls = ["http://%s:%d" % (host, number) for number in (port, event_port or port)]
    odoo = types.SimpleNamespace(build=build, database=DATABASE, http_url=urls[0], event_url=urls[1])
    odoo.log_in = functools.partial(Odoo.log_in, odoo)
    wait_until(lambda: health(odoo), 180, "%s to be healthy" % odoo.event_url, 0.1)
    return odoo


@functools.lru_cache
def _websocket_version():
    source = podman("run", "--rm", "--entrypoint", "cat", IMAGE, ADDONS + "bus/websocket.py")
    return re.search(r'^\s+_VERSION = "([^"]+)"', source, re.MULTILINE)[1]


def health(odoo):
    """Return what the addon answers, None if it does not."""
    with contextlib.suppress(OSError, ValueError):
        return Odoo.health(odoo, 5)
    return None


def create_database(odoo):
    """Create the database, as a user does in the browser."""
    fields = {"master_pwd": "admin", "name": DATABASE, "login": "admin", "password": "admin", "lang": "en_US"}
    with http_session() as session:
        answer = session.post(odoo.http_url + "/web/database/create", data={**fields, "phone": ""}, timeout=300)
    if not answer.ok or "alert-danger" in answer.text:
        raise RuntimeError("Odoo created no database: %s" % answer.text)


def query(statement, server):
    """Return what PostgreSQL itself answers, as text."""
    return podman("exec", server, "psql", "-U", "odoo", "-d", "postgres", "-Atc", statement)


def _check(name):
    """Run check.py in a container, by the command of the manual; return its verdict."""
    manual = (FOLDER / "clone" / "bus_alt_connection" / "readme" / "USAGE.rst").read_text()
    command = shlex.split(re.search(r"docker exec CONTAINER sh -c '.*?'\n", manual, re.DOTALL)[0])
    return podman("exec", name, "sh", "-c", command[-1].replace("path/to/", ADDONS)).splitlines()[-1]


def sender(pooler=POOLER, port=6432):
    """Return a :class:`BusSender` through PgBouncer, whose address may change with each connection."""

    def connect(database, **options):
        place = {"host": address(pooler), "port": port, "dbname": database}
        return psycopg2.connect(connect_timeout=2, **place, **options)

    instance = types.SimpleNamespace(series="19.0", database=DATABASE, system_database="postgres")
    return BusSender(instance, types.SimpleNamespace(user="odoo", password="odoo", connect=connect))


def push(*odoos, action=lambda: None, **pooler):
    """Send messages, before ``action`` and after it, to a client of each Odoo; return how many were sent and arrived.

    :raise TimeoutError: some have not arrived after a minute
    :raise RuntimeError: some were delivered twice
    """
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(odoo)) for odoo in odoos]
        channel = uuid.uuid4().hex
        flow = Flow(sender(**pooler), channel, 0.1)
        for client in clients:
            client.subscribe([channel])
            wait_until(lambda client=client: health(client.odoo)["listening"], 60, "a listener", 0.1)
        with flow:
            flow.wait_for(10)
            action()
            flow.wait_for(10)
        for client in clients:
            wait_until(lambda client=client: flow.sent.keys() <= set(client.messages), 60, "the last of the messages")
            if len(set(client.messages)) != len(client.messages):
                raise RuntimeError("messages were delivered twice: %s" % client.messages)
    each = " at each of %d" % len(odoos) if len(odoos) > 1 else ""
    refused = "; %d could not be sent" % flow.refused if flow.refused else ""
    return "%d of %d messages%s%s" % (len(flow.sent), len(flow.sent), each, refused)


def try_out(*odoos, direct, name, server=DB, **pooler):
    """Send messages to a client of each Odoo, count the direct connections, and run check.py; return what was seen.

    :param direct: how many direct connections there have to be, within two minutes
    :param name: the container for check.py
    """
    arrived = push(*odoos, **pooler)
    statement = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'odoo-listener-%'"
    wait_until(lambda: query(statement, server) == str(direct), 120, "%d direct connections" % direct, 0.5)
    return "%s; direct connections: %d; check.py: %s" % (arrived, direct, _check(name))
