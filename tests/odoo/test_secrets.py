"""No password gets into the log or a health answer, whatever fails, and wherever it was written."""

import pytest
import requests

from stack.stack import Stack
from tests.support.secrets import (
    ENCODED_PASSWORD,
    LISTENER_PASSWORD,
    POOLER_PASSWORD,
    SERVER_PASSWORD,
    WRONG_PASSWORD,
    leaks,
)

pytestmark = pytest.mark.variants("14.0-prefork", "19.0-threaded")


@pytest.fixture(scope="module")
def stack(variant):
    """A stack where Odoo has one password for the pooler and another for its listeners."""

    def environment(stack):
        assert stack.server.password == SERVER_PASSWORD
        stack.server.execute("CREATE ROLE listener LOGIN PASSWORD %s", (LISTENER_PASSWORD,))
        return as_it_should_be(stack)

    options = {
        "options": ["--log-handler=odoo.addons.bus_alt_connection:DEBUG"],
        "pooler_options": {"password": POOLER_PASSWORD},
    }
    with Stack(*variant, environment=environment, jobs=False, proxy=True, **options) as stack:
        yield stack


def as_it_should_be(stack):
    return {
        "IMDISPATCHER_DB_HOST": stack.proxy.host,
        "IMDISPATCHER_DB_PORT": str(stack.proxy.port),
        "IMDISPATCHER_DB_USER": "listener",
        "IMDISPATCHER_DB_PASSWORD": LISTENER_PASSWORD,
        "IMDISPATCHER_DB_CONNECT_TIMEOUT": "2",
        "IMDISPATCHER_CHECK_INTERVAL": "2",
        "IMDISPATCHER_POLL_INTERVAL": "1",
    }


#: what is different from how it should be, and what the log says then
FAILURES = {
    "none": (lambda stack: {}, [r"INFO .*listening on .*imbus"]),
    "wrong password": (
        lambda stack: {"IMDISPATCHER_DB_PASSWORD": WRONG_PASSWORD},
        ['ERROR .*can\'t listen .*password authentication failed for user "listener"'],
    ),
    "passwords where none belong": (
        lambda stack: {
            "IMDISPATCHER_DB_HOST": "postgresql://odoo:%s@127.0.0.1:5432/postgres" % ENCODED_PASSWORD,
            "IMDISPATCHER_DB_PORT": "odoo:%s@127.0.0.1" % WRONG_PASSWORD,
            "IMDISPATCHER_DB_DBNAME": "postgresql://odoo:%s@127.0.0.1/x" % (ENCODED_PASSWORD * 5),
            "IMDISPATCHER_DB_PASWORD": LISTENER_PASSWORD,
        },
        [
            "ERROR .*IMDISPATCHER_DB_HOST is a URI or DSN",
            "ERROR .*IMDISPATCHER_DB_PORT is ",
            "ERROR .*IMDISPATCHER_DB_DBNAME is a URI or DSN",
            "ERROR .*IMDISPATCHER_DB_PASWORD is not an option",
            "can't listen on database postgres: options are wrong, see the ERROR on each",
        ],
    ),
    "the pooler for a host": (
        lambda stack: {
            "IMDISPATCHER_DB_PORT": str(stack.pooler.port),
            "IMDISPATCHER_DB_USER": stack.pooler.user,
            "IMDISPATCHER_DB_PASSWORD": POOLER_PASSWORD,
        },
        ["ERROR .*is a pooler"],
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_no_password_is_told_anywhere(stack, failure):
    difference, expected = FAILURES[failure]
    mark = stack.odoo.run_with({**as_it_should_be(stack), **difference(stack)})
    with stack.client(listening=False) as client:
        for line in expected:
            stack.odoo.wait_for_log(line, mark, 20)
        if failure == "none":
            lose_it(stack, mark)
        health = requests.get(stack.odoo.event_url + "/bus_alt_connection/health", timeout=20).text
        stack.send("tests", failure)
        client.wait_for(failure, 10)
    assert not leaks(stack.odoo.log_since(mark))
    assert not leaks(health)


def lose_it(stack, mark):
    """What can go wrong with a listener that once worked, the sender's way included."""
    stack.proxy.refuse()
    stack.proxy.cut()
    stack.pooler.stop()
    stack.odoo.wait_for_log("DEBUG .*: 127.0.0.1:%d: .*Connection refused" % stack.pooler.port, mark)
    stack.proxy.forward()
    stack.odoo.wait_for_log("WARNING .*sending fails", mark, 20)
    stack.pooler.start()
    stack.odoo.wait_for_log("INFO .*listening again", mark, 20)
