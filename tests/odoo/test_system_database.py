"""A system database of one's own: all that Odoo does on ``postgres`` is done there, by senders and listeners alike."""

import re

import pytest
import requests

from stack.database import DATABASE
from stack.odoo import series_number
from stack.postgres import USER
from stack.stack import Stack
from stack.waiting import wait_until
from tests.support import traffic
from tests.support.actions import ScheduledAction, send
from tests.support.addonlog import records, troubles, wait_for_record, wait_until_confirmed
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
# As at DigitalOcean or Aiven, a pool for each database, made before the database. One has none.
POOLS = {"*": None, "postgres": None, "customer": "", DATABASE: "", DATABASE + "_new": ""}
WITHOUT_POOL = "without_pool"


def keep_to_itself(stack, database="postgres"):
    stack.server.execute("REVOKE CONNECT ON DATABASE %s FROM PUBLIC" % database)
    return {}


def with_customer(stack):
    # It is not Odoo's, which would take it for a database to work on.
    stack.server.execute("CREATE DATABASE customer")
    # Odoo's, since its role owns it, though dbfilter hides it.
    stack.server.execute("CREATE DATABASE %s OWNER %s" % (WITHOUT_POOL, USER))
    return keep_to_itself(stack)


@pytest.fixture(scope="module")
def stack(variant):
    """A stack whose role may not connect to ``postgres`` at all, with pools by name, as those of a managed server."""
    options = {"conf": CONF, "system_database": "customer", "environment": with_customer}
    with Stack(*variant, jobs=False, pooler_options={"databases": POOLS}, **options) as stack:
        yield stack


def hear(stack, client, text):
    """Have Odoo send, and wait until a client has it."""
    # Up to 15.0 a message that comes between two polls has to wait for the next.
    for _ in range(2):
        send(stack.odoo, "tests", [text])
    client.wait_for(text, 10)


def ways(stack, pattern, since=0):
    """Return the databases on which statements were said, and whether through the pooler, after a mark in the log."""
    said = traffic.statements(stack, since)
    return {(one.database, one.pooled) for one in said if re.search(pattern, one.text, re.IGNORECASE)}


@pytest.mark.matrix
@pytest.mark.variants("14.0-threaded", "19.0-prefork", before=19.1)  # 19.1 and later have Odoo's own option
def test_all_that_odoo_does_on_postgres_is_done_on_a_system_database_of_ones_own(stack):
    assert stack.server.value("SELECT has_database_privilege(%s, 'postgres', 'CONNECT')", (USER,)) is False
    triggers = series_number(stack.series) >= 15
    with stack.client() as client, overheard(stack.server) as heard_on_postgres:
        wait_until_confirmed(stack)
        hear(stack, client, "hello")
        if triggers:
            action = ScheduledAction(stack)
            action.trigger()
            wait_until(action.has_run, 10, "the action to run", tail=stack.odoo.log_tail)
            if stack.odoo.workers:  # up to 18.0, cron threads ask only databases that were used
                stack.odoo.wait_for_log("no such database: " + WITHOUT_POOL)
    assert ways(stack, "notify.*imbus") == ways(stack, "notify.*cron_trigger|notify.*imbus") == {("customer", True)}
    assert {one.database for one in traffic.statements(stack) if one.listens} == {"customer"}
    # So instances with different ones do not wake each other.
    assert heard_on_postgres == []
    assert {one.database for one in traffic.statements(stack)} == {"customer", DATABASE}
    assert REFUSED not in stack.server.log()
    assert troubles(stack) == []


@pytest.mark.rest
@pytest.mark.variants("14.0-threaded", "19.0-prefork")
def test_the_manager_makes_lists_and_drops_a_database(stack):
    new = DATABASE + "_new"
    assert databases(stack) == [DATABASE]
    mark = stack.server.log_mark()
    fields = {"lang": "en_US", "login": "admin", "password": "admin", "phone": "", "country_code": ""}
    manage(stack, "create", name=new, **fields)
    assert stack.server.value("SELECT count(*) FROM ir_module_module", dbname=new) > 10
    assert databases(stack) == [DATABASE, new]
    manage(stack, "drop", name=new)
    assert databases(stack) == [DATABASE]
    done = [one for one in traffic.statements(stack, mark) if re.match("(CREATE|DROP) DATABASE", one.text)]
    assert [(one.database, one.pooled) for one in done] == [("customer", True)] * 2
    assert "postgres" not in {one.database for one in traffic.statements(stack, mark)}


def manage(stack, what, **fields):
    """Do as the page of the web client that manages databases does."""
    url = "%s/web/database/%s" % (stack.odoo.http_url, what)
    answer = requests.post(url, {"master_pwd": MASTER, **fields}, allow_redirects=False, timeout=600)
    # An error would be told on that page.
    assert answer.status_code in (302, 303), re.findall("(?s)alert-danger.*?>(.*?)<", answer.text)


def databases(stack):
    """Return the list that the web client has."""
    answer = requests.post(stack.odoo.http_url + "/web/database/list", json={"params": {}}, timeout=60)
    return answer.json()["result"]


@pytest.mark.matrix
@pytest.mark.rest
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
        hear(stack, client, "hello")
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


@pytest.mark.variants("14.0-prefork", "19.0-threaded")
def test_a_role_that_may_only_connect_to_odoos_own_database_has_that_for_both(new_stack):
    stack = new_stack(jobs=False, conf=CONF, system_database=DATABASE, environment=keep_to_itself)
    with stack.client() as client:
        wait_until_confirmed(stack)
        hear(stack, client, "hello")
    assert {one.database for one in traffic.statements(stack) if one.listens} == {DATABASE}
    assert REFUSED not in stack.server.log()


@pytest.mark.variants("14.0-prefork", "19.0-threaded")
def test_a_system_database_that_can_not_be_had_is_told_and_odoo_starts(new_stack):
    def environment(stack):
        stack.server.execute("CREATE DATABASE customer")
        return keep_to_itself(stack, "customer")

    # With its databases given, Odoo need not ask for them.
    stack = new_stack(jobs=False, conf={"dbfilter": None}, system_database="customer", environment=environment)
    told = [one for one in records(stack) if one.message.startswith("can't use database customer in place of postgres")]
    processes = stack.odoo.processes()
    assert {one.pid for one in told} == {processes.main, processes.gevent} - {None}
    why = 'permission denied for database "customer"'
    assert all(one.level == "ERROR" and why in one.message for one in told)
    with stack.client(listening=False) as client:
        wait_for_record(stack, "can't listen on database customer: .*" + why)
        # Nor is it silently done on postgres instead.
        assert "postgres" not in {one.database for one in traffic.statements(stack) if one.listens}
        mark = stack.odoo.log_mark()
        stack.server.execute("GRANT CONNECT ON DATABASE customer TO PUBLIC")
        wait_until_confirmed(stack, mark)
        hear(stack, client, "hello")


@pytest.mark.variants("14.0-threaded", "19.0-threaded")
def test_if_it_is_given_a_database_odoo_itself_connects_to_postgres_before_it_loads_an_addon(new_stack):
    with pytest.raises(RuntimeError, match=REFUSED):
        new_stack(system_database="customer", environment=with_customer)
