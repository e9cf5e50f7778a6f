"""No password gets into the log or a health answer, whatever fails, and wherever it was written."""

import re

import pytest
import requests

from bus_alt_connection import settings
from stack.postgres import PASSWORD as SERVER_PASSWORD
from stack.stack import Stack
from tests.support.variants import VARIANTS

# Of words, so that a part of one is found as well, and of characters that mean something to somebody on the way.
POOLER_PASSWORD = "kilo'lima %mike= november;@oscar/:papa"
LISTENER_PASSWORD = "quebec'romeo \"sierra\\tango= uniform@victor/:whiskey"
WRONG_PASSWORD = "xray'yankee \"zulu\\alfa bravo=@charlie"
ENCODED_PASSWORD = "delta%27echo%20foxtrot%40golf%2Fhotel"

SECRETS = [SERVER_PASSWORD, POOLER_PASSWORD, LISTENER_PASSWORD, WRONG_PASSWORD, ENCODED_PASSWORD]


def words(secret):
    return [word for word in re.split(r"[^a-z]+", re.sub("%..", " ", secret)) if len(word) > 3]


SECRET_WORDS = [SERVER_PASSWORD] + [word for secret in SECRETS[1:] for word in words(secret)]


def leaks(text):
    return [word for word in SECRET_WORDS if word in text]


@pytest.fixture(scope="module", params=["14.0-prefork", "19.0-threaded"])
def stack(request):
    """A stack where Odoo has one password for the pooler and another for its listeners."""

    def environment(stack):
        stack.server.execute("CREATE ROLE listener LOGIN PASSWORD %s", (LISTENER_PASSWORD,))
        return as_it_should_be(stack)

    series, workers = VARIANTS[request.param]
    options = {
        "options": ["--log-handler=odoo.addons.bus_alt_connection:DEBUG"],
        "pooler_options": {"password": POOLER_PASSWORD},
    }
    with Stack(series, workers, environment=environment, proxy=True, **options) as stack:
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
            "IMDISPATCHER_DB_PORT": "postgresql://odoo:%s@127.0.0.1:5432/postgres" % WRONG_PASSWORD,
            "IMDISPATCHER_DB_DBNAME": "postgresql://odoo:%s@127.0.0.1/x" % (ENCODED_PASSWORD * 5),
            "IMDISPATCHER_DB_PASWORD": LISTENER_PASSWORD,
        },
        [
            r"ERROR .*IMDISPATCHER_DB_HOST=postgresql://odoo:\*\*\*@127.0.0.1:5432/postgres is not a host name",
            r"ERROR .*IMDISPATCHER_DB_PORT=postgresql://odoo:\*\*\*@127.0.0.1:5432/postgres is not a port",
            r"ERROR .*IMDISPATCHER_DB_DBNAME=postgresql://odoo:\*\*\*@127.0.0.1/x is a URI",
            r"ERROR .*IMDISPATCHER_DB_PASWORD=\*\*\* is not an option",
        ],
    ),
    "no TLS": (
        lambda stack: {"IMDISPATCHER_DB_SSLMODE": "require"},
        ["ERROR .*can't listen .*server does not support SSL"],
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
    mark = restart(stack, {**as_it_should_be(stack), **difference(stack)})
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


def restart(stack, variables):
    if stack.odoo.variables == variables:
        return 0
    stack.odoo.kill()
    mark = stack.odoo.log_mark()
    stack.odoo.variables = variables
    stack.odoo.start()
    return mark


def lose_it(stack, mark):
    """What can go wrong with a listener that once worked, the sender's way included."""
    stack.proxy.swallow()
    stack.odoo.wait_for_log("ERROR .*silent", mark)
    stack.proxy.refuse()
    stack.odoo.wait_for_log("DEBUG .*still not listening .*Connection refused", mark)
    stack.pooler.stop()
    stack.odoo.wait_for_log("DEBUG .*can't look into bus_bus", mark)
    stack.proxy.forward()
    stack.odoo.wait_for_log("WARNING .*sending fails", mark, 20)
    stack.pooler.start()
    stack.odoo.wait_for_log("INFO .*listening again", mark, 20)


URIS = [
    "postgresql://odoo:{}@db:5432/postgres",
    "postgres://odoo:{}@[::1],db/postgres?sslmode=require",
    "postgresql://db/postgres?user=odoo&password={}&sslmode=require",
    "postgresql://odoo:{}@db/postgres?sslpassword={}",
]
NO_URIS = [
    "host=db password='{}' dbname=postgres",
    "host=db password={} dbname=postgres",
    "host=db sslpassword = {} oauth_client_secret='{}'",
    "odoo:{}@db",
]
NAMES = ["IMDISPATCHER_DB_DBNAME", "IMDISPATCHER_DB_USER"]
NO_NAMES = [
    "IMDISPATCHER_DB_HOST",
    "ODOO_IMDISPATCHER_DB_HOST",
    "IMDISPATCHER_DB_PORT",
    "IMDISPATCHER_DB_SERVICE",
    "IMDISPATCHER_DB_SSLMODE",
    "IMDISPATCHER_DB_CONNECT_TIMEOUT",
    "IMDISPATCHER_DB_DSN",
    "IMDISPATCHER_URL",
    "IMDISPATCHER_CHECK_INTERVAL",
]


# Names that it does not know are for the server to refuse, but for URIs.
@pytest.mark.parametrize(
    "name, values", [(name, URIS) for name in NAMES] + [(name, URIS + NO_URIS) for name in NO_NAMES]
)
def test_a_password_where_none_belongs_is_not_told(name, values):
    for value in values:
        for secret in SECRETS:
            written = value.replace("{}", secret)
            in_file = {} if name.startswith("ODOO_") else {name.lower(): written}
            for found in settings.read({name: written}, {}), settings.read({}, in_file):
                assert found.errors or not in_file
                assert not leaks("\n".join(found.errors + found.warnings))
                assert secret not in str(found.connection)


@pytest.mark.parametrize(
    "message",
    [
        'FATAL:  database "postgresql://odoo:{}@127.0.0.1/x" does not exist',
        "invalid dsn: host=db password='{}'\n",
        "invalid connection option in password = {}, host=db",
    ],
)
def test_a_message_of_others_is_told_without_the_passwords_in_it(message):
    for secret in SECRETS:
        told = settings.redact(message.replace("{}", secret))
        assert not leaks(told)
        assert told.startswith(message.split()[0])


def test_a_message_with_a_password_that_is_known_is_told_without_it():
    for secret in SECRETS:
        for keyword in settings.SECRETS:
            told = settings.redact("can't do it:\n%s is wrong\n" % secret, {keyword: secret, "port": 5432})
            assert told == "can't do it:; *** is wrong"


def test_what_would_be_a_leak_is_found():
    for secret in SECRETS:
        assert leaks("connection to %s failed" % secret)
    assert leaks("connection to romeo failed") == ["romeo"]
