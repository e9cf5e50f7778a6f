"""What is configured, where it is looked for, and what is said about what is wrong."""

import os
import re

import hypothesis
import psycopg2
import pytest
from hypothesis import given, strategies
from psycopg2 import extensions

from bus_alt_connection import log, settings

MENDED = " No listener connects until that is mended"
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
        # Nor is what is blank, as a template leaves it.
        ({HOST: " \n", ALSO_HOST: "b"}, {}, "b"),
        ({HOST: " "}, {CONF_HOST: "c"}, "c"),
        ({}, {CONF_HOST: " "}, None),
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


NAME, DBNAME = "IMDISPATCHER_DB_NAME", "IMDISPATCHER_DB_DBNAME"


@pytest.mark.parametrize("name", [NAME, "ODOO_" + NAME, "imdispatcher_db_name"])
def test_the_name_is_that_of_the_database(name):
    found = settings.read({} if name.islower() else {name: "a"}, {name: "a"} if name.islower() else {})
    assert found.system_database == "a"
    assert found.errors == found.warnings == []


@pytest.mark.parametrize("used, other", [(DBNAME, NAME), ("imdispatcher_db_dbname", "imdispatcher_db_name")])
def test_two_names_of_the_database_that_differ_are_warned_of_in_each_source(used, other):
    names = {used: "a", other: "b"}
    found = settings.read({}, names) if used.islower() else settings.read(names, {})
    assert found.system_database == "a"
    assert found.warnings == ["%s and %s are both set and differ; %s is used" % (used, other, used)]
    assert settings.read({}, dict.fromkeys(names, "a")).warnings == []


def variables_of_service(name):
    """Return what Kubernetes sets in each pod for a Service with a named port."""
    place = "tcp://192.0.2.1:5432"
    parts = {"": place, "_PROTO": "tcp", "_PORT": "5432", "_ADDR": "192.0.2.1"}
    variables = {"SERVICE_HOST": "192.0.2.1", "SERVICE_PORT": "5432", "SERVICE_PORT_POSTGRES": "5432", "PORT": place}
    variables.update(("PORT_5432_TCP" + part, value) for part, value in parts.items())
    return {"%s_%s" % (name, key): value for key, value in variables.items()}


@pytest.mark.parametrize("service", ["IMDISPATCHER_DB", "IMDISPATCHER", "IMDISPATCHER_DB_RO", "ODOO_IMDISPATCHER_DB"])
def test_the_variables_of_a_service_in_kubernetes_get_one_line(service):
    variables = variables_of_service(service)
    found = settings.read({**variables, HOST: "db-01"}, {})
    (error,) = found.errors
    assert error.startswith("%s_PORT and 7 more: Kubernetes sets such variables for a Service. Rename" % service)
    assert "enableServiceLinks: false" in error and error.endswith(MENDED)
    assert "192.0.2.1" not in error
    assert sorted(found.refused) == sorted(variables)
    with pytest.raises(psycopg2.OperationalError):
        found.parameters({"dbname": "postgres"})


def test_a_port_that_is_set_in_the_pod_replaces_that_of_the_service():
    variables = {**variables_of_service("IMDISPATCHER_DB"), "IMDISPATCHER_DB_PORT": "5432"}
    (error,) = settings.read(variables, {}).errors
    assert error.startswith("IMDISPATCHER_DB_PORT_5432_TCP and 6 more: ")


def test_each_option_is_looked_for_on_its_own():
    found = read({HOST: "a", "ODOO_IMDISPATCHER_DB_PORT": "1"}, imdispatcher_db_user="c", imdispatcher_db_port="2")
    assert found.connection == {"host": "a", "port": "1", "user": "c"}


@pytest.mark.parametrize("keyword", settings.PLACES)
def test_it_is_configured_if_it_is_told_where_postgresql_is(keyword):
    assert read({"IMDISPATCHER_DB_" + keyword.upper(): "1"}).configured
    assert not read({"IMDISPATCHER_DB_USER": "a"}).configured


# Values ---------------------------------------------------------------------------------------------------------------

#: of libpq up to 18
KEYWORDS = """
    host hostaddr port dbname user password passfile connect_timeout client_encoding options application_name
    fallback_application_name keepalives keepalives_idle keepalives_interval keepalives_count tcp_user_timeout
    replication sslmode sslcompression sslcert sslkey sslpassword sslrootcert sslcrl sslcrldir sslsni sslcertmode
    sslnegotiation sslkeylogfile ssl_min_protocol_version ssl_max_protocol_version requirepeer krbsrvname gsslib
    gssencmode gssdelegation service target_session_attrs load_balance_hosts channel_binding require_auth
    min_protocol_version max_protocol_version oauth_client_id oauth_client_secret oauth_issuer oauth_scope
    scram_client_key scram_server_key
""".split()


def known_to_libpq(keyword):
    try:
        extensions.parse_dsn(keyword + "=0")
    except psycopg2.ProgrammingError:
        return False
    return True


# That of the database is for both ways, see below.
@pytest.mark.parametrize("keyword", [one for one in KEYWORDS if one != "dbname" and known_to_libpq(one)])
def test_every_keyword_of_libpq_is_an_option(keyword):
    value = {"sslmode": "require", "connect_timeout": "7"}.get(keyword, "a")
    found = read({"IMDISPATCHER_DB_" + keyword.upper(): value})
    assert found.connection == {keyword: value}
    assert found.errors == found.refused == []


def test_a_keyword_that_only_libpq_knows_is_an_option(monkeypatch):
    # One of a release to come, that is.
    monkeypatch.setattr(extensions, "parse_dsn", lambda dsn: {"of_libpq_99": "0"} if dsn == "of_libpq_99=0" else {})
    assert read({"IMDISPATCHER_DB_OF_LIBPQ_99": "a"}).connection == {"of_libpq_99": "a"}


@pytest.mark.parametrize("sslmode", ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"])
def test_each_sslmode_of_libpq_is_taken(sslmode):
    extensions.parse_dsn("sslmode=" + sslmode)
    assert read({"IMDISPATCHER_DB_SSLMODE": sslmode}).connection == {"sslmode": sslmode}


@pytest.mark.parametrize(
    "places",
    [
        {"HOST": "a,b", "PORT": "1,2"},
        {"HOST": "a,b", "PORT": "1"},
        {"HOSTADDR": "192.0.2.1,192.0.2.2", "PORT": "1,2"},
        {"HOST": "/run/postgresql,a", "PORT": "1,"},
        {"HOST": "@abstract"},
        {"HOST": "@abstract:1"},
        {"HOST": "/run/a:b"},
        {"HOST": "::1,fe80::1%eth0", "PORT": "1,2"},
        {"HOSTADDR": "::1"},
        {"PORT": "05432"},
    ],
)
def test_hosts_and_ports_may_be_lists(places):
    found = read({"IMDISPATCHER_DB_" + name: value for name, value in places.items()})
    assert found.connection == {name.lower(): value for name, value in places.items()}
    assert found.errors == []


@pytest.mark.parametrize(
    "keyword, value",
    [
        ("port", "54x2"),
        ("channel_binding", "maybe"),
        ("gssencmode", "maybe"),
        ("target_session_attrs", "primry"),
        ("sslrootcert", "/nowhere"),
        ("service", "of_nobody"),
        ("keepalives", "yes"),
    ],
)
def test_what_libpq_judges_as_it_connects_is_left_to_it(keyword, value):
    # See test_connection: it does.
    found = read({"IMDISPATCHER_DB_" + keyword.upper(): value})
    assert found.connection == {keyword: value}
    assert found.errors == found.refused == []


@pytest.mark.parametrize("keyword", ["host", "port", "sslmode", "sslrootcert", "user"])
def test_blanks_and_line_ends_around_a_value_are_none_of_it(keyword):
    value = "require" if keyword == "sslmode" else "a"
    assert read({"IMDISPATCHER_DB_" + keyword.upper(): " %s\n" % value}).connection == {keyword: value}


@pytest.mark.parametrize("keyword", filter(known_to_libpq, log.SECRETS))
def test_a_secret_is_taken_as_it_is(keyword):
    for value in " a b\n", " ", "postgresql://a", "password=a":
        assert read({"IMDISPATCHER_DB_" + keyword.upper(): value}).connection == {keyword: value}


@pytest.mark.parametrize(("text", "seconds"), [("0", 0), ("0.5", 0.5), ("1e3", 1000), (" 7 ", 7)])
def test_intervals_are_numbers_of_seconds(text, seconds):
    found = read({"IMDISPATCHER_CHECK_INTERVAL": text}, imdispatcher_poll_interval=text)
    assert found.check_interval == found.poll_interval == seconds
    assert found.errors == []


def test_intervals_have_defaults():
    found = read({})
    assert (found.check_interval, found.poll_interval) == (60, 5)


# What is wrong --------------------------------------------------------------------------------------------------------

MARK = "S3CR3T"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        # Misspelt: the nearest is named in the spelling that was used.
        ("IMDISPATCHER_DB_HOTS", MARK, "is not an option. Did you mean IMDISPATCHER_DB_HOST?"),
        ("ODOO_IMDISPATCHER_DB_HOTS", MARK, "is not an option. Did you mean ODOO_IMDISPATCHER_DB_HOST?"),
        ("imdispatcher_db_hots", MARK, "is not an option. Did you mean imdispatcher_db_host?"),
        ("IMDISPATCHER_HOST", MARK, "is not an option. Did you mean IMDISPATCHER_DB_HOST?"),
        ("IMDISPATCHER_DB_SSL_MODE", MARK, "is not an option. Did you mean IMDISPATCHER_DB_SSLMODE?"),
        ("IMDISPATCHER_SSLMODE", MARK, "is not an option. Did you mean IMDISPATCHER_DB_SSLMODE?"),
        ("IMDISPATCHER_DB_SSL_ROOT_CERT", MARK, "is not an option. Did you mean IMDISPATCHER_DB_SSLROOTCERT?"),
        ("IMDISPATCHER_DB_CHANEL_BINDING", MARK, "is not an option. Did you mean IMDISPATCHER_DB_CHANNEL_BINDING?"),
        ("IMDISPATCHER_DB_REQUIRE_AUTHS", MARK, "is not an option. Did you mean IMDISPATCHER_DB_REQUIRE_AUTH?"),
        ("IMDISPATCHER_DB_PASSWD", MARK, "is not an option. Did you mean IMDISPATCHER_DB_PASSWORD?"),
        ("IMDISPATCHER_DB_CHECK_INTERVAL", MARK, "is not an option. Did you mean IMDISPATCHER_CHECK_INTERVAL?"),
        ("IMDISPATCHER_CHEK_INTERVAL", MARK, "is not an option. Did you mean IMDISPATCHER_CHECK_INTERVAL?"),
        ("IMDISPATCHER_DB_XYZZY", MARK, "is not an option. Unset it."),
        ("IMDISPATCHER_DB_", MARK, "is not an option. "),
        ("IMDISPATCHER_", MARK, "is not an option. "),
        ("IMDISPATCHER_DB_HOST; --", MARK, "is not an option. "),
        # libpq would read each of these as another keyword, or as two.
        ("IMDISPATCHER_DB_HOST ", MARK, "is not an option. "),
        ("IMDISPATCHER_DB_PORT=1 HOST", MARK, "is not an option. "),
        ("IMDISPATCHER_DB_POSTGRESQL:///?HOST", MARK, "is not an option. "),
        # sslmode, on which depends what somebody on the way can read
        ("IMDISPATCHER_DB_SSLMODE", "verify_full", "is not an sslmode. Did you mean verify-full?"),
        ("ODOO_IMDISPATCHER_DB_SSLMODE", "verify_full", "is not an sslmode. Did you mean verify-full?"),
        ("imdispatcher_db_sslmode", "verify_full", "is not an sslmode. Did you mean verify-full?"),
        ("IMDISPATCHER_DB_SSLMODE", "VERIFY-CA", "is not an sslmode. Did you mean verify-ca?"),
        ("IMDISPATCHER_DB_SSLMODE", "requires", "is not an sslmode. Did you mean require?"),
        ("IMDISPATCHER_DB_SSLMODE", MARK, "is not an sslmode. Did you mean verify-full?"),
        # Hosts
        (
            "IMDISPATCHER_DB_HOST",
            "postgresql://db-01/postgres",
            "is a URI or DSN. Set host, port, user and password in",
        ),
        ("IMDISPATCHER_DB_HOST", "odoo@db-01", "is a URI or DSN. Set host, port, user and password in an option each."),
        ("IMDISPATCHER_DB_HOST", "host=db-01 port=5432", "is a URI or DSN. "),
        ("IMDISPATCHER_DB_HOSTADDR", "odoo@192.0.2.1", "is a URI or DSN. "),
        ("IMDISPATCHER_DB_HOST", "db-01:5432", "has a port. Set the host alone here, and the port in IMDISPATCHER_DB_"),
        ("IMDISPATCHER_DB_HOST", "db-01, db-02:5432", "has a port. "),
        ("IMDISPATCHER_DB_HOST", "[::1]:5432", "has a port. "),
        ("IMDISPATCHER_DB_HOSTADDR", "192.0.2.1:5432", "has a port. "),
        # The server would name these, and only the first 63 bytes of them.
        ("IMDISPATCHER_DB_DBNAME", "postgresql://db-01", "is a URI or DSN. "),
        ("IMDISPATCHER_DB_USER", "postgresql://db-01", "is a URI or DSN. "),
        # Ours to read, since libpq does not when it connects without blocking.
        ("IMDISPATCHER_DB_CONNECT_TIMEOUT", "7 s", "is not a whole number of seconds."),
        ("IMDISPATCHER_DB_CONNECT_TIMEOUT", "7.5", "is not a whole number of seconds."),
        ("IMDISPATCHER_DB_CONNECT_TIMEOUT", "\N{ARABIC-INDIC DIGIT TWO}", "is not a whole number of seconds."),
        ("IMDISPATCHER_DB_CONNECT_TIMEOUT", "9" * 5000, "is not a whole number of seconds."),
    ],
)
def test_what_is_wrong_is_named_once_and_keeps_us_from_connecting(name, value, message):
    in_file = name.islower()
    right = {} if name == HOST else {HOST: "db-01"}
    found = settings.read(right if in_file else {**right, name: value}, {name: value} if in_file else {})
    (error,) = found.errors
    assert error.startswith("%s %s" % (name, message))
    assert error.endswith(MENDED)
    assert value not in error
    assert found.refused == [name]
    assert found.warnings == []
    assert (found.check_interval, found.poll_interval) == (60, 5)
    with pytest.raises(psycopg2.OperationalError) as refused:
        found.parameters({"dbname": "postgres", "host": "pooler", "sslmode": "prefer"})
    assert "the ERROR on each at the start of Odoo" in str(refused.value)
    assert value not in str(refused.value)


@pytest.mark.parametrize("text", ["0", "7", " 7 ", "-1"])
def test_a_timeout_to_connect_is_a_whole_number(text):
    assert read({"IMDISPATCHER_DB_CONNECT_TIMEOUT": text}).connection == {"connect_timeout": text.strip()}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("IMDISPATCHER_CHECK_INTERVAL", "soon", "is not a number of seconds. Set it to 0 (off) or more. Using 60"),
        ("ODOO_IMDISPATCHER_CHECK_INTERVAL", "-1", "is not a number of seconds. Set it to 0 (off) or more. Using 60"),
        ("imdispatcher_poll_interval", "nan", "is not a number of seconds. Set it to 0 (off) or more. Using 5"),
        ("IMDISPATCHER_POLL_INTERVAL", "inf", "is not a number of seconds. Set it to 0 (off) or more. Using 5"),
    ],
)
def test_an_interval_that_is_wrong_is_named_and_does_no_harm(name, value, message):
    in_file = name.islower()
    found = settings.read({} if in_file else {name: value}, {name: value} if in_file else {})
    assert found.errors == ["%s %s" % (name, message)]
    assert found.refused == []
    assert (found.check_interval, found.poll_interval) == (60, 5)
    assert found.parameters({"dbname": "postgres"})["dbname"] == "postgres"


SHARE, CONF_SHARE = "IMDISPATCHER_SHARE", "imdispatcher_share"


@pytest.mark.parametrize(
    ("environ", "options", "share"),
    [
        ({}, {}, True),
        ({SHARE: "0"}, {}, False),
        ({SHARE: " False\n"}, {}, False),
        ({SHARE: "1"}, {}, True),
        ({SHARE: "TRUE"}, {}, True),
        *(({SHARE: word}, {}, True) for word in ("on", "Yes", "t", "y")),
        *(({SHARE: word}, {}, False) for word in ("off", "No", "f", "n", "FALSE")),
        ({}, {CONF_SHARE: "Off"}, False),
        ({"ODOO_" + SHARE: "0"}, {}, False),
        ({SHARE: "1"}, {CONF_SHARE: "0"}, True),
        ({SHARE: "0"}, {CONF_SHARE: "1"}, False),
        ({SHARE: ""}, {CONF_SHARE: "0"}, False),
        # As Odoo reads it.
        ({}, {CONF_SHARE: False}, False),
        ({}, {CONF_SHARE: "False"}, False),
        ({}, {CONF_SHARE: "false"}, False),
        ({}, {CONF_SHARE: True}, True),
        ({}, {CONF_SHARE: "True"}, True),
    ],
)
def test_sharing_is_switched_off_in_each_spelling(environ, options, share):
    found = settings.read(environ, options)
    assert found.share is share
    assert found.errors == found.warnings == found.refused == []


@pytest.mark.parametrize(
    "name, value", [(SHARE, "offf"), ("ODOO_" + SHARE, "2"), (CONF_SHARE, "perhaps"), (SHARE, "None"), (SHARE, "-1")]
)
def test_a_wrong_value_turns_sharing_off_and_is_named(name, value):
    found = settings.read({} if name.islower() else {name: value}, {name: value} if name.islower() else {})
    assert found.errors == ["%s is not a boolean. Set it to 1 (on) or 0 (off). Using 0" % name]
    assert found.refused == [] and found.share is False


def test_all_that_is_wrong_is_named():
    wrong = {
        "IMDISPATCHER_DB_SSLMODE": "requires",
        "IMDISPATCHER_DB_PROT": "1",
        "ODOO_IMDISPATCHER_DB_CONNECT_TIMEOUT": "soon",
        "IMDISPATCHER_CHECK_INTERVAL": "soon",
    }
    found = read({HOST: "db-01", "IMDISPATCHER_POLL_INTERVAL": "1", **wrong})
    assert sorted(error.split()[0] for error in found.errors) == sorted(wrong)
    assert sorted(found.refused) == sorted(set(wrong) - {"IMDISPATCHER_CHECK_INTERVAL"})
    assert (found.check_interval, found.poll_interval) == (60, 1)


def test_what_was_overruled_can_not_be_wrong():
    found = read({"IMDISPATCHER_DB_SSLMODE": "require"}, imdispatcher_db_sslmode="verify_full")
    assert found.connection == {"sslmode": "require"}
    assert found.errors == found.refused == []


@pytest.mark.parametrize("keyword", ["require_auth", "channel_binding", "tcp_user_timeout"])
def test_of_a_keyword_of_a_newer_libpq_is_not_said_that_it_is_misspelt(keyword, monkeypatch):
    parse = extensions.parse_dsn

    def parse_as_of_old(dsn):
        if dsn.startswith(keyword):
            raise psycopg2.ProgrammingError('invalid connection option "%s"' % keyword)
        return parse(dsn)

    monkeypatch.setattr(extensions, "parse_dsn", parse_as_of_old)
    name = "IMDISPATCHER_DB_" + keyword.upper()
    found = read({name: "a", HOST: "db-01"})
    (error,) = found.errors
    assert found.refused == [name]
    assert "Did you mean %s?" % name not in error


@hypothesis.settings(deadline=None)
@given(
    strategies.sampled_from(KEYWORDS) | strategies.text("abcdehlmoprst_", max_size=12),
    strategies.sampled_from(["IMDISPATCHER_DB_", "IMDISPATCHER_", "ODOO_IMDISPATCHER_DB_", "ODOO_IMDISPATCHER_"]),
    strategies.text(strategies.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1),
)
def test_nothing_that_is_set_is_left_out_in_silence(option, prefix, value):
    hypothesis.assume(value.strip())
    name = prefix + option.upper()
    found = read({name: value})
    if name in found.refused:
        with pytest.raises(psycopg2.OperationalError):
            found.parameters({"dbname": "postgres"})
    else:
        taken = dict(found.connection, dbname=found.system_database, name=found.system_database)
        assert taken[option] in (value, value.strip())


# Secrets --------------------------------------------------------------------------------------------------------------

# No environment variable holds a zero byte.
secrets = strategies.text(
    strategies.sampled_from(" \n'\"\\/@:;=%&")
    | strategies.characters(exclude_categories=["Cs"], exclude_characters="\0"),
    max_size=8,
)
names = strategies.sampled_from(
    [
        *("DB_" + keyword.upper() for keyword in KEYWORDS),
        "CHECK_INTERVAL",
        "POLL_INTERVAL",
        "URL",
        "PASSWORD",
        "DB_DSN",
        "DB_URL",
        "DB_PASSWORT",
        "DB_PASSWD",
        "DB_PWD",
        "DB_PASSWORD_FILE",
        "DB_SSL_PASSWORD",
        "DB_TOKEN",
        "DB_SECRET",
    ]
)
prefixes = strategies.sampled_from(["", "ODOO_"])
uris = strategies.sampled_from(
    [
        "%s",
        "postgresql://odoo:%s@db-01:5432/postgres",
        "postgres://:%s@db-01",
        "odoo:%s@db-01",
        "postgresql://db-01/postgres?user=odoo&password=%s",
        "host=db-01 password=%s user=odoo",
        "host=db-01 sslpassword = '%s'",
        "host=db-01 oauth_client_secret=%s",
    ]
)


def messages_on(environ, **options):
    found = settings.read(environ, options)
    messages = found.errors + found.warnings
    if found.refused:
        with pytest.raises(psycopg2.OperationalError) as refused:
            found.parameters({"dbname": "postgres"})
        messages.append(str(refused.value))
    for message in messages:
        assert len(message.splitlines()) == 1
    return " ".join(messages)


@hypothesis.settings(max_examples=200, deadline=None)
@given(names, prefixes, secrets, secrets, uris)
def test_no_message_has_a_value(name, prefix, before, after, uri):
    value = uri % (before + MARK + after)
    assert MARK not in messages_on({prefix + "IMDISPATCHER_" + name: value})
    assert MARK not in messages_on({}, **{"imdispatcher_" + name.lower(): value})
    # In both spellings, that differ.
    assert MARK not in messages_on({"IMDISPATCHER_" + name: value, "ODOO_IMDISPATCHER_" + name: value + "a"})


@hypothesis.settings(deadline=None)
@given(secrets, secrets, strategies.sampled_from(log.SECRETS))
def test_redact_takes_passwords_out(before, after, keyword):
    secret = before + MARK + after
    assert MARK not in log.redact('no entry for "%s"' % secret, {keyword: secret, "user": "odoo"})
    assert MARK not in log.redact("postgresql://odoo:%s@db-01" % secret)
    assert MARK not in log.redact("host=db-01 password=%s" % secret)


def test_redact_keeps_the_rest_on_one_line():
    message = 'connection to server at "db-01" failed: FATAL:  no\n\tIs it running?\n'
    assert log.redact(message) == 'connection to server at "db-01" failed: FATAL:  no; Is it running?'
    assert log.redact("postgresql://odoo:a@db-01/postgres") == "postgresql://odoo:***@db-01/postgres"


def test_a_password_that_was_never_set_changes_nothing():
    for parameters in ({}, {"password": None}, {"password": ""}, {"password": False}):
        assert log.redact("as it is", parameters) == "as it is"


# What is made of it ---------------------------------------------------------------------------------------------------


def test_what_is_configured_replaces_odoos_own_and_the_rest_stays():
    own = {"dbname": "postgres", "host": "pooler", "port": 6432, "user": "odoo", "password": "a", "sslmode": "prefer"}
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
    assert own["host"] == "pooler"  # it is Odoo's


@pytest.mark.parametrize("own", [{"password": "a"}, {}])
def test_a_passfile_replaces_the_passwords_of_odoo(own):
    # Empty, or libpq would prefer PGPASSWORD to the file.
    assert read({"IMDISPATCHER_DB_PASSFILE": "/a"}).parameters({"dbname": "postgres", **own})["password"] == ""


def test_a_password_of_the_listeners_comes_before_a_passfile():
    found = read({"IMDISPATCHER_DB_PASSFILE": "/a", "IMDISPATCHER_DB_PASSWORD": "b"})
    assert found.parameters({"dbname": "postgres", "password": "a"})["password"] == "b"


def test_the_name_of_a_listener_can_be_chosen():
    own = {"dbname": "postgres", "application_name": "odoo-1"}
    assert read({"IMDISPATCHER_DB_APPLICATION_NAME": "a"}).parameters(own)["application_name"] == "a"


def test_a_listener_listens_on_the_database_that_odoo_sends_on():
    found = read({"IMDISPATCHER_DB_DBNAME": "customer"})
    assert found.system_database == "customer"
    assert found.parameters({"dbname": "elsewhere"})["dbname"] == "elsewhere"
    assert read({}).system_database is None


@pytest.mark.parametrize("name", ["IMDISPATCHER_DB_DBNAME", "ODOO_IMDISPATCHER_DB_DBNAME", "imdispatcher_db_dbname"])
@pytest.mark.parametrize("database, warned", [("customer", True), ("postgres", True), ("system", False)])
def test_where_odoo_has_an_option_for_it_that_rules(name, database, warned):
    environ, options = ({}, {name: database}) if name.islower() else ({name: database}, {})
    found = settings.read(environ, options, "system")
    assert found.system_database is None
    assert found.errors == []
    assert found.warnings == ["%s and Odoo's own db_system differ; db_system is used" % name] * warned


def test_a_database_that_is_wrong_stands_for_nothing():
    found = read({"IMDISPATCHER_DB_DBNAME": "postgresql://db-01/customer"})
    assert found.refused == ["IMDISPATCHER_DB_DBNAME"]
    assert found.system_database is None


def test_of_a_database_alone_nobody_knows_where_it_is():
    assert not read({"IMDISPATCHER_DB_DBNAME": "customer"}).configured


OWN = {"dbname": "postgres", "host": "pooler", "port": 6432, "user": "odoo", "password": "a", "sslmode": "prefer"}


def test_a_service_says_where_and_how():
    found = read({"IMDISPATCHER_DB_SERVICE": "direct"}).parameters(OWN)
    assert {key: found.get(key) for key in (*OWN, "service")} == {
        "dbname": "postgres",
        "host": None,
        "port": None,
        "sslmode": None,
        "user": "odoo",
        "password": "a",
        "service": "direct",
    }


def test_a_service_does_not_ask_for_less_than_odoo_does():
    found = read({"IMDISPATCHER_DB_SERVICE": "direct"}).parameters({**OWN, "sslmode": "verify-full"})
    assert found["sslmode"] == "verify-full"


@pytest.mark.parametrize("own", ["disable", "allow", "prefer"])
def test_a_service_may_ask_for_more_than_odoo_does(own):
    found = read({"IMDISPATCHER_DB_SERVICE": "direct"}, db_sslmode=own)
    assert found.errors == []
    assert "sslmode" not in found.parameters({**OWN, "sslmode": own})


@pytest.mark.parametrize("own", ["require", "verify-ca"])
def test_where_either_may_ask_for_more_somebody_has_to_say_which(own):
    found = read({"IMDISPATCHER_DB_SERVICE": "direct"}, db_sslmode=own)
    (error,) = found.errors
    assert error.startswith(
        "IMDISPATCHER_DB_SERVICE may ask for more than db_sslmode does. Say which in IMDISPATCHER_DB"
    )
    with pytest.raises(psycopg2.OperationalError):
        found.parameters({**OWN, "sslmode": own})
    assert read({"IMDISPATCHER_DB_SERVICE": "direct", "IMDISPATCHER_DB_SSLMODE": own}, db_sslmode=own).errors == []


@pytest.mark.parametrize("name", ["IMDISPATCHER_DB_\udcff", "IMDISPATCHER_\udcff", "imdispatcher_db_\udcff"])
def test_a_name_that_is_no_text_is_no_option(name):
    found = settings.read({name: "a"}, {}) if name.isupper() else settings.read({}, {name: "a"})
    assert len(found.errors) == len(found.refused) == 1


def test_what_is_configured_beside_a_service_comes_before_it():
    environ = {"SERVICE": "direct", "HOST": "db-01", "PORT": "5433", "SSLMODE": "prefer"}
    found = read({"IMDISPATCHER_DB_" + key: value for key, value in environ.items()}).parameters(OWN)
    assert {key.upper(): found[key] for key in ("service", "host", "port", "sslmode")} == environ


def test_an_address_takes_the_place_of_the_poolers_name():
    found = read({"IMDISPATCHER_DB_HOSTADDR": "192.0.2.1"}).parameters(OWN)
    assert "host" not in found
    assert found["hostaddr"] == "192.0.2.1"
    both = read({"IMDISPATCHER_DB_HOSTADDR": "192.0.2.1", HOST: "db-01"}).parameters(OWN)
    assert (both["host"], both["hostaddr"]) == ("db-01", "192.0.2.1")


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
        ({"service": "direct"}, "service direct"),
        ({"service": "direct", "host": "db-01"}, "db-01:5432"),
    ],
)
def test_an_address_is_what_people_would_write(parameters, text):
    assert settings.address(parameters) == text
