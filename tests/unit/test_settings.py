"""Which options count, what is made of them, and that a wrong one is named without its value and fails closed."""

import os

import psycopg2
import pytest
from hypothesis import given, strategies
from hypothesis import settings as hypothesis_settings
from psycopg2 import extensions

from bus_alt_connection import settings
from tests.support.secrets import SECRETS

CORRECTED = " No listener connects until this is corrected"
HOST, ALSO_HOST, CONF_HOST = "IMDISPATCHER_DB_HOST", "ODOO_IMDISPATCHER_DB_HOST", "imdispatcher_db_host"
#: what Odoo itself connects with
OWN = {"dbname": "postgres", "host": "pooler", "port": 6432, "user": "odoo", "password": "a", "sslmode": "prefer"}


def read_one(name, value):
    """Return the settings with one option, in the source that writes names so."""
    return settings.read({}, {name: value}) if name.islower() else settings.read({name: value}, {})


def read_db(odoos=(), **options):
    """Return the settings with these ``IMDISPATCHER_DB_...`` in the environment, and ``odoos`` in odoo.conf."""
    return settings.read({"IMDISPATCHER_DB_" + name: value for name, value in options.items()}, dict(odoos))


def assert_refused(found, *names):
    """Check that ``names`` keep the listeners from connecting."""
    assert sorted(found.refused) == sorted(names)
    with pytest.raises(psycopg2.OperationalError, match="Correct those that Odoo logged as ERROR"):
        found.parameters(OWN)


# Sources


@pytest.mark.parametrize(
    ("environ", "options", "host"),
    [
        ({HOST: "a", ALSO_HOST: "a"}, {CONF_HOST: "c"}, "a"),
        ({ALSO_HOST: "b"}, {CONF_HOST: "c"}, "b"),
        # An empty value counts as unset, and so does a blank one, as a template leaves it.
        ({HOST: "", ALSO_HOST: "b"}, {}, "b"),
        ({HOST: " \n", ALSO_HOST: ""}, {CONF_HOST: "c"}, "c"),
        # Odoo writes an unset option as False.
        ({}, {CONF_HOST: False}, None),
        ({}, {CONF_HOST: "False"}, None),
        # Odoo's own options, and libpq's, are no options of the addon.
        ({"DB_HOST": "d", "PGHOST": "d"}, {"db_host": "d"}, None),
    ],
)
def test_the_first_source_with_a_value_counts(environ, options, host):
    found = settings.read(environ, options)
    assert found.connection == ({"host": host} if host else {})
    assert found.errors == found.warnings == []


@pytest.mark.parametrize(
    ("used", "other"),
    [
        ("IMDISPATCHER_DB_PASSWORD", "ODOO_IMDISPATCHER_DB_PASSWORD"),
        ("imdispatcher_db_dbname", "imdispatcher_db_name"),
    ],
)
def test_two_values_that_differ_are_warned_of_without_them(used, other):
    values = {used: "alfa", other: "bravo"}
    found = settings.read({}, values) if used.islower() else settings.read(values, {})
    assert found.warnings == ["%s and %s are both set and differ; %s is used" % (used, other, used)]
    assert "alfa" in (found.system_database, *found.connection.values())


# Values


def test_each_keyword_that_libpq_knows_is_an_option(monkeypatch):
    for keyword in ("user", "sslrootcert", "target_session_attrs", "keepalives_idle"):
        assert read_db(**{keyword.upper(): "a"}).connection == {keyword: "a"}
    # So is that of a release to come, and one of today is not with an older libpq.
    monkeypatch.setattr(extensions, "parse_dsn", lambda dsn: {"of_libpq_99": "0"} if dsn == "of_libpq_99=0" else {})
    assert read_db(OF_LIBPQ_99="a").connection == {"of_libpq_99": "a"}
    (error,) = read_db(REQUIRE_AUTH="a").errors
    assert "is not known to this libpq. Unset it, or install a psycopg2 that has a newer libpq." in error


@pytest.mark.parametrize(
    "options",
    [
        *({"SSLMODE": sslmode} for sslmode in settings.SSLMODES),
        *({"CONNECT_TIMEOUT": timeout} for timeout in ("0", "7", "-1")),
        {"HOST": "/run/postgresql,a", "PORT": "1,"},
        {"HOST": "@abstract:1"},
        {"HOST": "::1,fe80::1%eth0", "PORT": "1,2"},
        # libpq judges these when it connects, see test_connection.
        {"PORT": "54x2"},
        {"CHANNEL_BINDING": "maybe"},
    ],
)
def test_right_values_are_taken(options):
    found = read_db(**options)
    assert found.connection == {name.lower(): value for name, value in options.items()}
    assert found.errors == found.refused == []


def test_a_password_is_taken_as_it_is():
    for password in " a b\n", " ", "postgresql://a", "password=a", *SECRETS:
        assert read_db(PASSWORD=password, SSLPASSWORD=password).parameters(OWN)["sslpassword"] == password


@pytest.mark.parametrize(("text", "seconds"), [("0", 0), ("0.5", 0.5), ("1e3", 1000), (" 7 ", 7)])
def test_an_interval_is_a_number_of_seconds(text, seconds):
    found = settings.read({"IMDISPATCHER_CHECK_INTERVAL": text}, {"imdispatcher_poll_interval": text})
    assert found.check_interval == found.poll_interval == seconds
    assert found.errors == []


@pytest.mark.parametrize("share, words", [(True, "1 TRUE on Yes t y"), (False, "0 False off No f n")])
@pytest.mark.parametrize("name", ["IMDISPATCHER_SHARE", "ODOO_IMDISPATCHER_SHARE", "imdispatcher_share"])
def test_sharing_is_switched_in_each_spelling(name, share, words):
    # Odoo gives an option of odoo.conf as a bool.
    for value in [*words.split(), share] if name.islower() else words.split():
        found = read_one(name, value)
        assert found.share is share
        assert found.errors == found.warnings == found.refused == []
    assert settings.read({}, {}).share is True


# Wrong options


@pytest.mark.parametrize("prefix", ["IMDISPATCHER_", "ODOO_IMDISPATCHER_", "imdispatcher_"])
def test_the_option_that_was_meant_is_named_in_the_spelling_that_was_used(prefix):
    wrong, meant = ("db_hots", "db_host") if prefix.islower() else ("DB_HOTS", "DB_HOST")
    (error,) = read_one(prefix + wrong, "a").errors
    assert error == "%s is not an option. Did you mean %s?%s" % (prefix + wrong, prefix + meant, CORRECTED)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("SSL_MODE", "verify-full", "is not an option. Did you mean IMDISPATCHER_DB_SSLMODE?"),
        ("DB_CHECK_INTERVAL", "kilo", "is not an option. Did you mean IMDISPATCHER_CHECK_INTERVAL?"),
        ("DB_\udcff", "kilo", "is not an option. Unset it."),
        # libpq would read each of these as another keyword, or as two.
        ("DB_PORT=1 HOST", "kilo", "is not an option. "),
        ("DB_POSTGRESQL:///?HOST", "kilo", "is not an option. "),
        # Whoever is between the two ends can read what a weaker sslmode does not protect.
        ("DB_SSLMODE", "verify_full", "is not an sslmode. Did you mean verify-full?"),
        ("DB_HOST", "postgresql://db-01", "is a URI or DSN. Set host, port, user and password in separate options."),
        ("DB_HOST", "host=db-01 port=5432", "is a URI or DSN. "),
        ("DB_HOST", "odoo:kilo@db-01", "is a URI or DSN. "),
        # The server would name this, and only the first 63 bytes of it.
        ("DB_DBNAME", "postgresql://db-01", "is a URI or DSN. "),
        ("DB_HOST", "db-01, db-02:5432", "has a port. Set the host alone here, and the port in IMDISPATCHER_DB_PORT."),
        ("DB_HOSTADDR", "192.0.2.1:5432", "has a port. "),
        ("DB_CONNECT_TIMEOUT", "7.5", "is not a whole number of seconds."),
        ("DB_CONNECT_TIMEOUT", "\N{ARABIC-INDIC DIGIT TWO}", "is not a whole number of seconds."),
        ("DB_CONNECT_TIMEOUT", "9" * 5000, "is not a whole number of seconds."),
    ],
)
def test_a_wrong_option_is_named_without_its_value_and_keeps_the_listeners_from_connecting(option, value, message):
    name = "IMDISPATCHER_" + option
    found = read_one(name, value)
    (error,) = found.errors
    assert error.startswith("%s %s" % (name, message)) and error.endswith(CORRECTED)
    assert value not in error
    assert found.warnings == [] and found.system_database is None
    assert_refused(found, name)


NO_NUMBER = "is not a number of seconds. Set it to 0 (off) or more. Using %d"
NO_BOOLEAN = "is not a boolean. Set it to 1 (on) or 0 (off). Using 0"


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("IMDISPATCHER_CHECK_INTERVAL", "soon -1 1e9", NO_NUMBER % 60),
        ("imdispatcher_poll_interval", "soon nan inf", NO_NUMBER % 5),
        # Perhaps it was written to switch sharing off.
        ("IMDISPATCHER_SHARE", "None -1", NO_BOOLEAN),
        ("imdispatcher_share", "perhaps 2", NO_BOOLEAN),
    ],
)
def test_a_wrong_option_that_is_the_addons_own_is_named_and_does_no_harm(name, values, message):
    for value in values.split():
        found = read_one(name, value)
        assert found.errors == ["%s %s" % (name, message)]
        assert (found.check_interval, found.poll_interval) == (60, 5)
        assert found.share is not name.lower().endswith("share")
        assert found.parameters(OWN)["dbname"] == "postgres"


def variables_of_service(name):
    """Return what Kubernetes sets in each pod for a Service with a named port."""
    place = "tcp://192.0.2.1:5432"
    parts = {"": place, "_PROTO": "tcp", "_PORT": "5432", "_ADDR": "192.0.2.1"}
    variables = {"SERVICE_HOST": "192.0.2.1", "SERVICE_PORT": "5432", "SERVICE_PORT_POSTGRES": "5432", "PORT": place}
    variables.update(("PORT_5432_TCP" + part, value) for part, value in parts.items())
    return {"%s_%s" % (name, key): value for key, value in variables.items()}


@pytest.mark.parametrize("service", ["IMDISPATCHER_DB", "IMDISPATCHER", "IMDISPATCHER_DB_RO", "ODOO_IMDISPATCHER_DB"])
def test_the_variables_of_a_service_in_kubernetes_are_refused_in_one_line(service):
    variables = variables_of_service(service)
    found = settings.read({**variables, HOST: "db-01"}, {})
    (error,) = found.errors
    assert error.startswith("%s_PORT and 7 more: Kubernetes sets such variables for a Service. Rename" % service)
    assert "192.0.2.1" not in error and error.endswith(CORRECTED)
    assert_refused(found, *variables)


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    strategies.sampled_from(settings._USUAL.split()) | strategies.text("abcdehlmoprst_", max_size=12),
    strategies.sampled_from(["IMDISPATCHER_DB_", "IMDISPATCHER_", "ODOO_IMDISPATCHER_DB_"]),
    strategies.text("a1 =@:/\n", min_size=1).filter(str.strip),
)
def test_an_option_is_used_or_refused_but_never_ignored(option, prefix, value):
    name = prefix + option.upper()
    found = read_one(name, value)
    if name in found.refused:
        assert_refused(found, name)
    else:
        taken = dict(found.connection, dbname=found.system_database, name=found.system_database)
        assert taken[option] in (value, value.strip())


# What is made of them


def test_the_options_replace_odoos_own_keywords_and_the_rest_stays():
    own = dict(OWN)
    found = read_db(HOST="db-01", PASSWORD="b").parameters(own)
    assert found == dict(OWN, host="db-01", password="b", application_name="odoo-listener-%d" % os.getpid())
    assert own == OWN


@pytest.mark.parametrize(
    ("options", "own", "expected"),
    [
        # An empty password, or libpq would prefer PGPASSWORD to the file.
        ({"PASSFILE": "/a"}, {}, {"password": ""}),
        ({"PASSFILE": "/a", "PASSWORD": "b"}, {}, {"password": "b"}),
        ({"APPLICATION_NAME": "a"}, {"application_name": "odoo-1"}, {"application_name": "a"}),
        # Whoever listens elsewhere than Odoo sends hears nothing.
        ({"DBNAME": "customer"}, {"dbname": "elsewhere"}, {"dbname": "elsewhere"}),
        # A service says where and how, but is asked for no less protection than Odoo's own connections have.
        ({"SERVICE": "direct"}, {}, {"host": None, "port": None, "sslmode": None, "user": "odoo", "service": "direct"}),
        ({"SERVICE": "direct"}, {"sslmode": "verify-full"}, {"sslmode": "verify-full"}),
        (
            {"SERVICE": "direct", "HOST": "db-01", "PORT": "5433", "SSLMODE": "prefer"},
            {},
            {"service": "direct", "host": "db-01", "port": "5433", "sslmode": "prefer"},
        ),
        # The name that goes with an address is not the pooler's.
        ({"HOSTADDR": "192.0.2.1"}, {}, {"host": None, "hostaddr": "192.0.2.1"}),
        ({"HOSTADDR": "192.0.2.1", "HOST": "db-01"}, {}, {"host": "db-01", "hostaddr": "192.0.2.1"}),
    ],
)
def test_the_keywords_of_a_listener_follow_from_the_options_and_odoos_own(options, own, expected):
    found = read_db(**options).parameters({**OWN, **own})
    assert {keyword: found.get(keyword) for keyword in expected} == expected


@pytest.mark.parametrize("sslmode", ["require", "verify-ca"])
def test_where_odoo_or_the_service_may_ask_for_more_protection_an_operator_has_to_say_which(sslmode):
    found = read_db({"db_sslmode": sslmode}, SERVICE="direct")
    (error,) = found.errors
    assert error.startswith("IMDISPATCHER_DB_SERVICE may require a stricter sslmode than db_sslmode. Set the one to")
    assert_refused(found, "IMDISPATCHER_DB_SERVICE")
    assert read_db({"db_sslmode": sslmode}, SERVICE="direct", SSLMODE=sslmode).errors == []
    assert read_db({"db_sslmode": "prefer"}, SERVICE="direct").errors == []


def test_it_is_configured_if_an_option_says_where_postgresql_is():
    assert all(read_db(**{place.upper(): "1"}).configured for place in settings.PLACES)
    assert not read_db(USER="a", DBNAME="customer").configured


@pytest.mark.parametrize("name", ["IMDISPATCHER_DB_DBNAME", "IMDISPATCHER_DB_NAME", "imdispatcher_db_name"])
def test_the_system_database_is_that_of_the_option_unless_odoo_has_an_own_one(name):
    assert read_one(name, "customer").system_database == "customer"
    source = ({}, {name: "customer"}) if name.islower() else ({name: "customer"}, {})
    for db_system, warnings in (
        ("customer", []),
        ("system", [name + " and Odoo's own db_system differ; db_system is used"]),
    ):
        found = settings.read(*source, db_system)
        assert found.system_database is None
        assert found.warnings == warnings and found.errors == []


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({}, "local socket:5432"),
        ({"host": "db-01", "port": 5433}, "db-01:5433"),
        ({"host": "a,b", "port": "1"}, "a:1,b:1"),
        ({"hostaddr": "192.0.2.1"}, "192.0.2.1:5432"),
        ({"service": "direct"}, "service direct"),
        # Odoo's own db_host may be a URI by mistake.
        ({"host": "postgres://odoo:s3cret@db/x"}, "postgres://odoo:***@db/x:5432"),
    ],
)
def test_an_address_is_shown_as_people_would_write_it(parameters, text):
    assert settings.address(parameters) == text
