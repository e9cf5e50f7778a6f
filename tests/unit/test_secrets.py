"""No password gets into a message, wherever it was written."""

import pytest

from bus_alt_connection import log, settings
from tests.support.secrets import SECRETS, leaks

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
    "IMDISPATCHER_DB_HOSTADDR",
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
                # Where the listeners go to is told as well.
                assert secret not in str(found.connection)
                assert not leaks(settings.address(found.connection))


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
        told = log.redact(message.replace("{}", secret))
        assert not leaks(told)
        assert told.startswith(message.split()[0])


def test_a_message_with_a_password_that_is_known_is_told_without_it():
    for secret in SECRETS:
        for keyword in log.SECRETS:
            told = log.redact("can't do it:\n%s is wrong\n" % secret, {keyword: secret, "port": 5432})
            assert told == "can't do it:; *** is wrong"


def test_what_would_be_a_leak_is_found():
    for secret in SECRETS:
        assert leaks("connection to %s failed" % secret)
    assert leaks("connection to romeo failed") == ["romeo"]
