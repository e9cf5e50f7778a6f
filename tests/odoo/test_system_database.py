"""A system database of one's own: all that Odoo does on ``postgres`` is done there, by senders and listeners alike."""

import contextlib
import re

import pytest
import requests

from stack.clients import client_class
from stack.database import DATABASE
from stack.odoo import Odoo, series_number
from stack.postgres import USER
from stack.stack import ADDON, Stack
from stack.waiting import wait_until
from tests.support import traffic
from tests.support.actions import ScheduledAction, caller, run_code, send
from tests.support.addonlog import bus_pid, records, troubles, wait_for_record, wait_until_confirmed
from tests.support.overheard import overheard

MASTER = "master-s3cret"
# Odoo itself connects to postgres at its start if it is given a database.
CONF = {
    "db_name": None,
    "dbfilter": "^%s" % DATABASE,
    "admin_passwd": MASTER,
    # To make a database takes a while.
    "limit_time_cpu": 600,
    "limit_time_real": 1200,
}
REFUSED = 'permission denied for database "postgres"'

# From 19.1 on there is one of Odoo's own.
our_option = pytest.mark.variants(before=19.1)


def keep_to_itself(stack, database="postgres"):
    stack.server.execute("REVOKE CONNECT ON DATABASE %s FROM PUBLIC" % database)
    return {}


def with_customer(stack):
    # It is not Odoo's, which would take it for a database to work on.
    stack.server.execute("CREATE DATABASE customer")
    return keep_to_itself(stack)


@pytest.fixture(scope="module")
def stack(variant):
    """A stack whose role may not connect to ``postgres`` at all, as that of a managed server."""
    options = {"conf": CONF, "system_database": "customer", "environment": with_customer}
    with Stack(*variant, jobs=False, **options) as stack:
        yield stack


@pytest.fixture
def nothing_on_postgres(stack):
    """What the test has Odoo do leads nobody to ``postgres``."""
    mark = stack.server.log_mark()
    yield
    assert "postgres" not in {one.database for one in traffic.statements(stack, mark)}
    assert REFUSED not in stack.server.log_since(mark)


def hear(odoo, client, text):
    """Have Odoo send, and wait until a client has it."""
    # Up to 15.0 a message that comes between two polls has to wait for the next.
    for message in (text, text + " again"):
        send(odoo, "tests", message)
    client.wait_for(text, 10)


def listening_on(stack, odoo):
    """Return the databases that processes of an Odoo listen on."""
    processes = odoo.processes()
    names = {"odoo-listener-%d" % pid for pid in (processes.main, processes.gevent, *processes.cron) if pid}
    return {row.datname for row in stack.direct_connections() if row.application_name in names}


def ways(stack, pattern, since=0):
    """Return the databases on which statements were said, and whether through the pooler, after a mark in the log."""
    said = traffic.statements(stack, since)
    return {(one.database, one.pooled) for one in said if re.search(pattern, one.text, re.IGNORECASE)}


@pytest.mark.matrix
@our_option
def test_nobody_has_been_to_postgres_since_the_start(stack):
    assert stack.server.value("SELECT has_database_privilege(%s, 'postgres', 'CONNECT')", (USER,)) is False
    with stack.client():
        wait_until_confirmed(stack)
    said = traffic.statements(stack)
    assert {one.database for one in said if one.listens} == {"customer"}
    assert {one.database for one in said} == {"customer", DATABASE}
    assert REFUSED not in stack.server.log()
    assert troubles(stack) == []


@pytest.mark.matrix
@our_option
def test_the_bus_sends_and_listens_there(stack, nothing_on_postgres):
    with stack.client() as client:
        wait_until_confirmed(stack)
        mark = stack.server.log_mark()
        hear(stack.odoo, client, "hello")
        assert listening_on(stack, stack.odoo) == {"customer"}
        assert ways(stack, "notify.*imbus", mark) == {("customer", True)}


def test_scheduled_actions_run(stack, nothing_on_postgres):
    action = ScheduledAction(stack)
    mark = stack.server.log_mark()
    action.trigger()
    # Up to 14.0 cron looks for work once a minute.
    triggers = series_number(stack.series) >= 15
    wait_until(action.has_run, 10 if triggers else 100, "the action to run", tail=stack.odoo.log_tail)
    assert ways(stack, "notify.*cron_trigger", mark) == ({("customer", True)} if triggers else set())


def test_the_manager_makes_lists_and_drops_a_database(stack, nothing_on_postgres):
    new = DATABASE + "_new"
    assert databases(stack) == [DATABASE]
    mark = stack.server.log_mark()
    fields = {"lang": "en_US", "login": "admin", "password": "admin", "phone": "", "country_code": ""}
    manage(stack, "create", name=new, **fields)
    assert stack.server.value("SELECT count(*) FROM ir_module_module", dbname=new) > 10
    assert databases(stack) == [DATABASE, new]
    manage(stack, "drop", name=new)
    assert databases(stack) == [DATABASE]
    assert not stack.server.execute("SELECT FROM pg_database WHERE datname = %s", (new,))
    done = [one for one in traffic.statements(stack, mark) if re.match("(CREATE|DROP) DATABASE", one.text)]
    assert [(one.database, one.pooled) for one in done] == [("customer", True)] * 2


def manage(stack, what, **fields):
    """Do as the page of the web client that manages databases does."""
    url = "%s/web/database/%s" % (stack.odoo.http_url, what)
    answer = requests.post(url, {"master_pwd": MASTER, **fields}, allow_redirects=False, timeout=600)
    # An error would be told on that page.
    assert answer.status_code in (302, 303), re.findall("(?s)alert-danger.*?>(.*?)<", answer.text)


def databases(stack):
    """Return the list that the web client has, which is that of the service for programs."""
    url = stack.odoo.http_url
    listed = requests.post(url + "/web/database/list", json={"params": {}}, timeout=60).json()["result"]
    call = {"params": {"service": "db", "method": "list", "args": []}}
    # That one is not filtered: it has all that Odoo's role owns.
    assert requests.post(url + "/jsonrpc", json=call, timeout=60).json()["result"] == listed
    return listed


# Instances side by side


def test_instances_with_different_ones_do_not_wake_each_other(new_stack, variant):
    def prepare(stack):
        for name in ("customer_a", "customer_b"):
            stack.server.execute("CREATE DATABASE %s" % name)
        stack.server.execute("CREATE DATABASE second TEMPLATE %s OWNER %s" % (DATABASE, USER))
        return {}

    stack = new_stack(jobs=False, system_database="customer_a", environment=prepare)
    direct = {"IMDISPATCHER_DB_HOST": stack.server.host, "IMDISPATCHER_DB_PORT": str(stack.server.port)}
    variables = {**direct, "IMDISPATCHER_DB_DBNAME": "customer_b"}
    with Odoo(stack.build, stack.pooler, "second", variant[1], ADDON, environment=variables) as second:
        with stack.client() as client, contextlib.closing(client_of(second)) as other_client:
            check_that_only_it_hears(stack, stack.odoo, client, "customer_a", "customer_b")
            check_that_only_it_hears(stack, second, other_client, "customer_b", "customer_a")


def check_that_only_it_hears(stack, odoo, client, own, foreign):
    wait_until(lambda: listening_on(stack, odoo) == {own}, 20, "listeners on %s" % own)
    with overheard(stack.server, own) as heard, overheard(stack.server, foreign) as overhears:
        hear(odoo, client, "hello")
        if series_number(stack.series) >= 15:
            run_code(caller(odoo), "env['ir.cron'].search([], limit=1)._trigger()")
    triggers = {"cron_trigger"} if series_number(stack.series) >= 15 else set()
    assert {one.channel for one in heard} == {"imbus"} | triggers
    assert overhears == []


def client_of(odoo):
    kind, version = client_class(odoo.build.series), odoo.build.websocket_version
    client = kind(odoo.http_url, odoo.event_url, odoo.database, websocket_version=version)
    client.subscribe(["tests"])
    return client


# Odoo's own option


@pytest.mark.matrix
@pytest.mark.variants(since=19.1)
@pytest.mark.parametrize("given, used", [("customer", "customer"), (None, "postgres")], ids=["set", "unset"])
def test_odoos_own_option_rules_where_there_is_one(new_stack, given, used):
    def prepare(stack):
        stack.server.execute("CREATE DATABASE customer")
        return {}

    stack = new_stack(jobs=False, conf={"db_system": given}, system_database="customer", environment=prepare)
    with stack.client(listening=False) as client:
        wait_until_confirmed(stack)
        action = ScheduledAction(stack)
        mark = stack.server.log_mark()
        hear(stack.odoo, client, "hello")
        action.trigger()
        wait_until(action.has_run, 10, "the action to run", tail=stack.odoo.log_tail)
    assert ways(stack, "listen cron_trigger") == {(used, False)}
    assert ways(stack, "notify.*cron_trigger", mark) == {(used, True)}
    # The bus of the first builds of 19.1 stays on postgres, whatever the option says. Where it sends it is listened.
    ((bus, pooled),) = ways(stack, "notify.*imbus", mark)
    assert bus in (used, "postgres") and pooled
    assert ways(stack, "listen imbus") == {(bus, False)}
    warning = "IMDISPATCHER_DB_DBNAME and Odoo's own db_system differ; db_system is used"
    assert {one.message for one in troubles(stack)} == ({warning} if used != "customer" else set())


# Roles that may do little


@pytest.mark.variants("14.0-prefork", "19.0-threaded")
def test_a_role_that_may_only_connect_to_odoos_own_database_has_that_for_both(new_stack):
    stack = new_stack(jobs=False, conf=CONF, system_database=DATABASE, environment=keep_to_itself)
    with stack.client() as client:
        wait_until_confirmed(stack)
        hear(stack.odoo, client, "hello")
        assert listening_on(stack, stack.odoo) == {DATABASE}
        # What is missed is looked for in it, as in any other of Odoo's.
        mark = stack.odoo.log_mark()
        with contextlib.closing(stack.sender()) as sender:
            sender.insert("tests", "missed")
        (lost,) = (
            row.pid for row in stack.direct_connections() if row.application_name.endswith("-%d" % bus_pid(stack))
        )
        stack.server.execute("SELECT pg_terminate_backend(%s)", (lost,))
        wait_until_confirmed(stack, mark)
        client.wait_for("missed", 10)
    assert REFUSED not in stack.server.log()


@pytest.mark.variants("14.0-threaded", "19.0-prefork")
@pytest.mark.parametrize(
    "prepare, why, mend",
    [
        (lambda stack: {}, 'database "customer" does not exist', "CREATE DATABASE customer"),
        (
            lambda stack: with_customer(stack) or keep_to_itself(stack, "customer"),
            'permission denied for database "customer"',
            "GRANT CONNECT ON DATABASE customer TO PUBLIC",
        ),
    ],
    ids=["does not exist", "refuses us"],
)
def test_one_that_can_not_be_had_is_told_and_odoo_starts(new_stack, prepare, why, mend):
    def environment(stack):
        prepare(stack)
        stack.server.execute("GRANT CONNECT ON DATABASE postgres TO PUBLIC")
        return {}

    # With its databases given, Odoo need not ask for them.
    stack = new_stack(jobs=False, conf={"dbfilter": None}, system_database="customer", environment=environment)
    told = [
        one for one in records(stack) if one.message.startswith("can't use database customer in place of postgres: ")
    ]
    assert len(told) == len(starts(stack))
    assert {one.level for one in told} == {"ERROR"}
    assert all(why in one.message for one in told)
    with stack.client(listening=False) as client:
        wait_for_record(stack, "can't listen on database customer: .*" + why)
        # Nor is it silently done on postgres instead.
        assert "postgres" not in {one.database for one in traffic.statements(stack) if one.listens}
        mark = stack.odoo.log_mark()
        stack.server.execute(mend)
        wait_until_confirmed(stack, mark)
        hear(stack.odoo, client, "hello")


def starts(stack):
    """Return the ids of the processes that have loaded the addon themselves; all others are forks of the first."""
    processes = stack.odoo.processes()
    return {processes.main, processes.gevent} - {None}


# What no addon can change, and what the manual says of it.


@pytest.mark.variants("14.0-threaded", "19.0-threaded")
def test_if_it_is_given_a_database_odoo_itself_connects_to_postgres_before_it_loads_an_addon(new_stack):
    with pytest.raises(RuntimeError, match=REFUSED):
        new_stack(system_database="customer", environment=with_customer)
