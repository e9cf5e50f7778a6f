"""What is configured, where it is looked for, and what is said about what is wrong."""

import os
import re

import hypothesis
import psycopg2
import pytest
from hypothesis import given, strategies
from psycopg2 import extensions

from bus_alt_connection import settings

HOST, ALSO_HOST, CONF_HOST = "IMDISPATCHER_DB_HOST", "ODOO_IMDISPATCHER_DB_HOST", "imdispatcher_db_host"


def read(environ, **options):
    return settings.read(environ, options)


# Sources --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "options", "host"),
    [
        ({HOST: "a"}, {}, "a"),
        ({ALSO_HOST: "b"}, {}, "b"),
        ({}, {CONF_HOST: "c"}, "c"),
        ({HOST: "a", ALSO_HOST: "a"}, {CONF_HOST: "c"}, "a"),
        ({ALSO_HOST: "b"}, {CONF_HOST: "c"}, "b"),
        # What is empty is not set.
        ({HOST: "", ALSO_HOST: "b"}, {CONF_HOST: "c"}, "b"),
        ({HOST: "", ALSO_HOST: ""}, {CONF_HOST: "c"}, "c"),
        ({HOST: ""}, {CONF_HOST: ""}, None),
        # So does Odoo write it.
        ({}, {CONF_HOST: False}, None),
        ({}, {CONF_HOST: "False"}, None),
        ({}, {CONF_HOST: "None"}, None),
        # Odoo's own options are its own.
        ({"DB_HOST": "d", "PGHOST": "d"}, {"db_host": "d"}, None),
    ],
)
def test_the_first_source_that_has_a_value_counts(environ, options, host):
    found = settings.read(environ, options)
    assert found.connection == ({"host": host} if host else {})
    assert found.errors == found.warnings == []


def test_two_spellings_that_differ_are_warned_of_once():
    found = read({HOST: "a", ALSO_HOST: "b"}, imdispatcher_db_host="c")
    assert found.connection == {"host": "a"}
    assert found.errors == []
    (warning,) = found.warnings
    assert HOST in re.findall(r"\w+", warning)
    assert ALSO_HOST in re.findall(r"\w+", warning)


def test_a_warning_on_passwords_that_differ_has_none_of_them():
    found = read({"IMDISPATCHER_DB_PASSWORD": "hush", "ODOO_IMDISPATCHER_DB_PASSWORD": "quiet"})
    assert found.connection == {"password": "hush"}
    (warning,) = found.warnings
    assert "hush" not in warning
    assert "quiet" not in warning


def test_each_option_is_looked_for_on_its_own():
    found = read({HOST: "a", "ODOO_IMDISPATCHER_DB_PORT": "1"}, imdispatcher_db_user="c", imdispatcher_db_port="2")
    assert found.connection == {"host": "a", "port": "1", "user": "c"}


@pytest.mark.parametrize("keyword", settings.PLACES)
def test_it_is_configured_if_it_is_told_where_postgresql_is(keyword, service):
    value = {"port": "1", "service": service, "hostaddr": "192.0.2.1"}.get(keyword, "a")
    assert read({"IMDISPATCHER_DB_" + keyword.upper(): value}).configured
    assert not read({"IMDISPATCHER_DB_USER": "a"}).configured


# Values ---------------------------------------------------------------------------------------------------------------

#: a value that libpq takes, where not any will do
GOOD = {
    "channel_binding": "prefer",
    "gssdelegation": "1",
    "gssencmode": "disable",
    "hostaddr": "192.0.2.1",
    "load_balance_hosts": "random",
    "max_protocol_version": "latest",
    "min_protocol_version": "3.0",
    "port": "5433",
    "require_auth": "scram-sha-256",
    "scram_client_key": "A" * 43 + "=",
    "scram_server_key": "A" * 43 + "=",
    "ssl_max_protocol_version": "TLSv1.3",
    "ssl_min_protocol_version": "TLSv1.2",
    "sslcertmode": "allow",
    "sslmode": "require",
    "sslnegotiation": "postgres",
    "sslsni": "1",
    "target_session_attrs": "read-write",
    **dict.fromkeys(settings.NUMBERS, "7"),
}


@pytest.fixture
def service(tmp_path, monkeypatch):
    """The name of a service that libpq knows."""
    (tmp_path / "services").write_text("[a_service]\nhost=db-01\n")
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    return "a_service"


def known_to_libpq(keyword):
    try:
        extensions.parse_dsn(keyword + "=0")
    except psycopg2.ProgrammingError:
        return False
    return True


@pytest.mark.parametrize("keyword", filter(known_to_libpq, settings.KEYWORDS))
def test_every_keyword_of_libpq_is_an_option(keyword, service):
    value = service if keyword == "service" else GOOD.get(keyword, "a")
    found = read({"IMDISPATCHER_DB_" + keyword.upper(): value})
    assert found.connection == {keyword: value}
    assert found.errors == []


def test_a_keyword_that_only_libpq_knows_is_an_option(monkeypatch):
    # One of a release to come, that is.
    monkeypatch.delitem(settings.KEYWORDS, "sslcrldir")
    assert read({"IMDISPATCHER_DB_SSLCRLDIR": "a"}).connection == {"sslcrldir": "a"}


@pytest.mark.parametrize(
    "places",
    [
        {"HOST": "a,b", "PORT": "1,2"},
        {"HOST": "a,b", "PORT": "1"},
        {"HOSTADDR": "192.0.2.1,192.0.2.2", "PORT": "1,2"},
        {"HOST": "/run/postgresql,a", "PORT": "1,"},
        {"PORT": "05432"},
    ],
)
def test_hosts_and_ports_may_be_lists(places):
    found = read({"IMDISPATCHER_DB_" + name: value for name, value in places.items()})
    assert found.connection == {name.lower(): value for name, value in places.items()}
    assert found.errors == []


def test_ports_may_be_those_of_odoos_own_hosts():
    assert read({"IMDISPATCHER_DB_PORT": "1,2"}, db_host="a,b").connection == {"port": "1,2"}


@pytest.mark.parametrize(("text", "seconds"), [("0", 0), ("0.5", 0.5), ("1e3", 1000), (" 7 ", 7)])
def test_intervals_are_numbers_of_seconds(text, seconds):
    found = read({"IMDISPATCHER_CHECK_INTERVAL": text}, imdispatcher_poll_interval=text)
    assert found.check_interval == found.poll_interval == seconds
    assert found.errors == []


def test_intervals_have_defaults():
    found = read({})
    assert (found.check_interval, found.poll_interval) == (60, 5)


# What is wrong --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        # Misspelt: the nearest is named in the spelling that was used.
        ("IMDISPATCHER_DB_HOTS", "a", r"Did you mean IMDISPATCHER_DB_HOST\?"),
        ("ODOO_IMDISPATCHER_DB_HOTS", "a", r"Did you mean ODOO_IMDISPATCHER_DB_HOST\?"),
        ("imdispatcher_db_hots", "a", r"Did you mean imdispatcher_db_host\?"),
        ("IMDISPATCHER_HOST", "a", r"Did you mean IMDISPATCHER_DB_HOST\?"),
        ("IMDISPATCHER_DB_SSL_ROOT_CERT", "a", r"Did you mean IMDISPATCHER_DB_SSLROOTCERT\?"),
        ("IMDISPATCHER_DB_CHECK_INTERVAL", "1", r"Did you mean IMDISPATCHER_CHECK_INTERVAL\?"),
        ("IMDISPATCHER_CHEK_INTERVAL", "1", r"Did you mean IMDISPATCHER_CHECK_INTERVAL\?"),
        ("IMDISPATCHER_DB_XYZZY", "a", "is not an option and is left out. Unset it"),
        ("IMDISPATCHER_DB_", "a", "is not an option"),
        ("IMDISPATCHER_", "a", "is not an option"),
        ("IMDISPATCHER_DB_HOST; --", "a", "is not an option"),
        # Ports
        ("IMDISPATCHER_DB_PORT", "54x2", "is not a port and is left out. Set it to a number from 1 to 65535"),
        ("IMDISPATCHER_DB_PORT", "0", "is not a port"),
        ("IMDISPATCHER_DB_PORT", "-5432", "is not a port"),
        ("IMDISPATCHER_DB_PORT", "65536", "is not a port"),
        ("IMDISPATCHER_DB_PORT", "5432;5433", "is not a port"),
        ("IMDISPATCHER_DB_PORT", "1,two", "is not a port"),
        # Digits all the same; the first is none for int(), the second is one, but none for libpq.
        ("IMDISPATCHER_DB_PORT", "543\N{SUPERSCRIPT TWO}", "is not a port"),
        ("IMDISPATCHER_DB_PORT", "543\N{ARABIC-INDIC DIGIT TWO}", "is not a port"),
        ("IMDISPATCHER_DB_PORT", "5" * 5000, "is not a port"),
        ("IMDISPATCHER_DB_PORT", "5432,5433", r"has 2 ports for 1 host\(s\) and is left out. Set one port, or one"),
        # Hosts
        ("IMDISPATCHER_DB_HOST", "postgresql://db-01/postgres", "is not a host name and is left out. Set the host"),
        ("IMDISPATCHER_DB_HOST", "odoo@db-01", "is not a host name"),
        ("IMDISPATCHER_DB_HOST", "host=db-01 port=5432", "is not a host name"),
        # The server would name these, and only the first 63 bytes of them.
        ("IMDISPATCHER_DB_DBNAME", "postgresql://db-01", "is a URI and is left out. Set the host"),
        ("IMDISPATCHER_DB_USER", "postgresql://db-01", "is a URI and is left out"),
        # Numbers
        ("IMDISPATCHER_DB_CONNECT_TIMEOUT", "7 s", "is not a whole number"),
        ("IMDISPATCHER_DB_TCP_USER_TIMEOUT", "1.5", "is not a whole number and is left out"),
        ("IMDISPATCHER_DB_KEEPALIVES", "yes", "is not a whole number"),
        ("IMDISPATCHER_DB_KEEPALIVES_IDLE", "\N{ARABIC-INDIC DIGIT TWO}", "is not a whole number"),
        ("IMDISPATCHER_DB_KEEPALIVES_COUNT", "99999999999", "is not a whole number"),
        # Values that libpq refuses; the rest is its message.
        ("IMDISPATCHER_DB_SSLMODE", "requires", "is left out: .*sslmode"),
        ("IMDISPATCHER_DB_TARGET_SESSION_ATTRS", "primry", "is left out: .*target_session_attrs"),
        ("IMDISPATCHER_DB_GSSENCMODE", "maybe", "is left out: .*gssencmode"),
        ("IMDISPATCHER_DB_SSL_MIN_PROTOCOL_VERSION", "TLSv9", "is left out: .*ssl_min_protocol_version"),
        ("IMDISPATCHER_DB_SERVICE", "of_nobody", "is left out: .*of_nobody"),
        # Intervals
        ("IMDISPATCHER_CHECK_INTERVAL", "soon", "is not a number of seconds; using 60. Set it to 0"),
        ("IMDISPATCHER_CHECK_INTERVAL", "-1", "is not a number of seconds"),
        ("IMDISPATCHER_POLL_INTERVAL", "nan", "is not a number of seconds; using 5. "),
        ("IMDISPATCHER_POLL_INTERVAL", "inf", "is not a number of seconds"),
    ],
)
def test_what_is_wrong_is_left_out_and_named_once(name, value, message):
    in_file = name.islower()
    found = settings.read({} if in_file else {name: value}, {name: value} if in_file else {})
    (error,) = found.errors
    assert error.startswith("%s=%s " % (name, value))
    assert re.search(message, error)
    assert found.connection == {}
    assert (found.check_interval, found.poll_interval) == (60, 5)


def test_what_is_right_is_kept():
    found = read(
        {
            "IMDISPATCHER_DB_HOST": "db-01",
            "IMDISPATCHER_DB_PORT": "x",
            "IMDISPATCHER_DB_SSLMODE": "requires",
            "IMDISPATCHER_DB_SSLCRL": "a",
            "IMDISPATCHER_DB_PROT": "1",
            "IMDISPATCHER_CHECK_INTERVAL": "soon",
            "IMDISPATCHER_POLL_INTERVAL": "1",
        }
    )
    assert len(found.errors) == 4
    assert found.connection == {"host": "db-01", "sslcrl": "a"}
    assert (found.check_interval, found.poll_interval) == (60, 1)


def test_more_ports_than_hosts_leave_the_hosts():
    found = read({HOST: "a,b", "IMDISPATCHER_DB_PORT": "1,2,3"})
    (error,) = found.errors
    assert error.startswith("IMDISPATCHER_DB_PORT=1,2,3 has 3 ports for 2 host(s)")
    assert found.connection == {"host": "a,b"}


def test_an_address_is_needed_for_each_host():
    found = read({HOST: "a,b", "IMDISPATCHER_DB_HOSTADDR": "127.0.0.1"})
    (error,) = found.errors
    assert error.startswith("IMDISPATCHER_DB_HOSTADDR=127.0.0.1 has 1 address(es) for 2 host(s)")
    assert found.connection == {"host": "a,b"}


def test_values_that_do_not_go_together_are_left_out():
    versions = {
        "IMDISPATCHER_DB_SSL_MIN_PROTOCOL_VERSION": "TLSv1.3",
        "IMDISPATCHER_DB_SSL_MAX_PROTOCOL_VERSION": "TLSv1.2",
    }
    found = read(versions)
    (error,) = found.errors
    assert "is left out: " in error
    assert len(found.connection) == 1


def test_what_only_odoos_own_sslmode_forbids_is_left_out():
    own = {"db_sslmode": "require"}
    found = settings.read({"IMDISPATCHER_DB_SSLROOTCERT": "system"}, own)
    (error,) = found.errors
    assert error.startswith("IMDISPATCHER_DB_SSLROOTCERT=system is left out: ")
    both = {"IMDISPATCHER_DB_SSLROOTCERT": "system", "IMDISPATCHER_DB_SSLMODE": "verify-full"}
    assert settings.read(both, own).errors == []


def test_what_needs_a_network_is_not_refused_for_want_of_it(monkeypatch):
    connect = psycopg2.connect

    def connect_as_libpq_17(**parameters):
        # It says so before it even tries to connect.
        if parameters.get("gssencmode") == "require" and parameters["host"].startswith("/"):
            raise psycopg2.OperationalError("GSSAPI encryption required but it is not supported over a local socket")
        return connect(**parameters)

    monkeypatch.setattr(psycopg2, "connect", connect_as_libpq_17)
    found = read({"IMDISPATCHER_DB_GSSENCMODE": "require"})
    assert found.connection == {"gssencmode": "require"}


def test_a_keyword_of_a_newer_libpq_names_it(monkeypatch):
    parse = extensions.parse_dsn

    def parse_as_of_old(dsn):
        if dsn.startswith("tcp_user_timeout"):
            raise psycopg2.ProgrammingError('invalid connection option "tcp_user_timeout"')
        return parse(dsn)

    monkeypatch.setattr(extensions, "parse_dsn", parse_as_of_old)
    monkeypatch.setattr(extensions, "libpq_version", lambda: 110005)
    found = read({"IMDISPATCHER_DB_TCP_USER_TIMEOUT": "7", HOST: "db-01"})
    (error,) = found.errors
    assert error.startswith(
        "IMDISPATCHER_DB_TCP_USER_TIMEOUT=7 needs libpq 12 or newer, this one is 11.5; it is left out"
    )
    assert found.connection == {"host": "db-01"}


# Secrets --------------------------------------------------------------------------------------------------------------

MARK = "S3CR3T"
# No environment variable holds a zero byte.
secrets = strategies.text(
    strategies.sampled_from(" \n'\"\\/@:;=%&")
    | strategies.characters(exclude_categories=["Cs"], exclude_characters="\0"),
    max_size=8,
)
names = strategies.sampled_from(
    [
        "IMDISPATCHER_CHECK_INTERVAL",
        "IMDISPATCHER_DB_DSN",
        "IMDISPATCHER_DB_URL",
        "IMDISPATCHER_URL",
        *("IMDISPATCHER_DB_" + keyword.upper() for keyword in settings.KEYWORDS),
    ]
)
prefixes = strategies.sampled_from(["", "ODOO_"])


def messages_on(environ, **options):
    found = settings.read(environ, options)
    for message in found.errors + found.warnings:
        assert len(message.splitlines()) == 1
    return " ".join(found.errors + found.warnings)


@given(
    strategies.sampled_from(
        [
            *("DB_" + keyword.upper() for keyword in settings.SECRETS),
            "DB_PASSWORT",
            "DB_PASSWD",
            "DB_PSWD",
            "DB_PASS",
            "DB_PWD",
            "DB_PASWORD",
            "DB_PASSWORD_FILE",
            "DB_SSL_PASSWORD",
            "DB_TOKEN",
            "DB_SECRET",
            "DB_CREDENTIALS",
            "PASSWORD",
        ]
    ),
    prefixes,
    secrets,
    secrets,
)
def test_no_message_has_the_value_of_a_secret_option(option, prefix, before, after):
    value = before + MARK + after
    assert MARK not in messages_on({prefix + "IMDISPATCHER_" + option: value})
    assert MARK not in messages_on({}, **{"imdispatcher_" + option.lower(): value})


@hypothesis.settings(max_examples=400)
@given(
    names,
    prefixes,
    secrets,
    secrets,
    strategies.sampled_from(
        [
            "postgresql://odoo:%s@db-01:5432/postgres",
            "postgres://:%s@db-01",
            "odoo:%s@db-01",
            "postgresql://db-01/postgres?user=odoo&password=%s",
            "host=db-01 password=%s user=odoo",
            "host=db-01 sslpassword = '%s'",
            "host=db-01 oauth_client_secret=%s",
        ]
    ),
)
def test_no_message_has_the_password_of_a_uri(name, prefix, before, after, uri):
    assert MARK not in messages_on({prefix + name: uri % (before + MARK + after)})


def test_a_secret_that_libpq_refuses_is_not_shown(monkeypatch):
    def connect(**parameters):
        # As libpq 18 does with the keys of SCRAM.
        raise psycopg2.OperationalError('invalid value: "%s"' % parameters.get("sslpassword", ""))

    monkeypatch.setattr(psycopg2, "connect", connect)
    messages = messages_on({"IMDISPATCHER_DB_SSLPASSWORD": MARK})
    assert "IMDISPATCHER_DB_SSLPASSWORD=*** is left out" in messages
    assert MARK not in messages


@given(secrets, secrets, strategies.sampled_from(settings.SECRETS))
def test_redact_takes_passwords_out(before, after, keyword):
    secret = before + MARK + after
    assert MARK not in settings.redact('no entry for "%s"' % secret, {keyword: secret, "user": "odoo"})
    assert MARK not in settings.redact("postgresql://odoo:%s@db-01" % secret)
    assert MARK not in settings.redact("host=db-01 password=%s" % secret)


def test_redact_keeps_the_rest_on_one_line():
    message = 'connection to server at "db-01" failed: FATAL:  no\n\tIs it running?\n'
    assert settings.redact(message) == 'connection to server at "db-01" failed: FATAL:  no; Is it running?'
    assert settings.redact("postgresql://odoo:a@db-01/postgres") == "postgresql://odoo:***@db-01/postgres"


def test_a_password_that_was_never_set_changes_nothing():
    for parameters in ({}, {"password": None}, {"password": ""}, {"password": False}):
        assert settings.redact("as it is", parameters) == "as it is"


# What is made of it ---------------------------------------------------------------------------------------------------


def test_what_is_configured_replaces_odoos_own_and_the_rest_stays():
    own = {"database": "postgres", "host": "pooler", "port": 6432, "user": "odoo", "password": "a", "sslmode": "prefer"}
    found = read({HOST: "db-01", "IMDISPATCHER_DB_PASSWORD": "b"})
    assert found.parameters(own) == {
        "application_name": "odoo-listener-%d" % os.getpid(),
        "dbname": "postgres",
        "host": "db-01",
        "port": 6432,
        "user": "odoo",
        "password": "b",
        "sslmode": "prefer",
    }
    assert own["database"] == "postgres"  # it is Odoo's


def test_the_name_of_a_listener_can_be_chosen():
    own = {"database": "postgres", "application_name": "odoo-1"}
    assert read({"IMDISPATCHER_DB_APPLICATION_NAME": "a"}).parameters(own)["application_name"] == "a"


@pytest.mark.parametrize(
    ("configured", "database", "system_database", "dbname"),
    [
        (None, "postgres", "postgres", "postgres"),
        ("elsewhere", "postgres", "postgres", "elsewhere"),
        ("elsewhere", "customer", "postgres", "customer"),
        ("elsewhere", "postgres", "system", "postgres"),
        ("elsewhere", "system", "system", "elsewhere"),
    ],
)
def test_a_database_is_configured_for_the_system_database_only(configured, database, system_database, dbname):
    found = read({"IMDISPATCHER_DB_DBNAME": configured or ""})
    assert found.parameters({"database": database}, system_database)["dbname"] == dbname


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, [(None, None, None)]),
        ({"host": "a"}, [("a", None, None)]),
        ({"host": "a", "port": 1}, [("a", None, "1")]),
        ({"host": "a,b", "port": "1,2"}, [("a", None, "1"), ("b", None, "2")]),
        ({"host": "a,b", "port": "1"}, [("a", None, "1"), ("b", None, "1")]),
        ({"host": "a,b"}, [("a", None, None), ("b", None, None)]),
        ({"host": "a", "hostaddr": "1,2", "port": "3,4"}, [("a", "1", "3"), ("a", "2", "4")]),
    ],
)
def test_each_host_gets_parameters_of_its_own(parameters, expected):
    hosts = settings.each_host({"user": "odoo", **parameters})
    assert [tuple(one.get(name) for name in ("host", "hostaddr", "port")) for one in hosts] == expected
    assert all(one["user"] == "odoo" for one in hosts)


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({}, "local socket:5432"),
        ({"host": "db-01"}, "db-01:5432"),
        ({"host": "db-01", "port": 5433}, "db-01:5433"),
        ({"host": "a,b", "port": "1,2"}, "a:1,b:2"),
        ({"host": "a,b", "port": "1,"}, "a:1,b:5432"),
        ({"host": "a,b", "port": "1"}, "a:1,b:1"),
        ({"hostaddr": "192.0.2.1"}, "192.0.2.1:5432"),
        ({"host": "/run/postgresql"}, "/run/postgresql:5432"),
    ],
)
def test_an_address_is_what_people_would_write(parameters, text):
    assert settings.address(parameters) == text
