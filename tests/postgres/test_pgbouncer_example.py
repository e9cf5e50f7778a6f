"""docs/pgbouncer.ini is what all tests run on; and PgBouncer takes from it what it says."""

import configparser
import contextlib
import re

import pytest

from stack.pgbouncer import EXAMPLE, EXAMPLE_SERVER, PgBouncer

#: what a test's pooler must have otherwise
OURS = {"listen_port", "auth_file", "server_login_retry"}


@pytest.fixture(scope="module")
def config(pooler):
    """The rows of SHOW CONFIG, by name."""
    return {row["key"]: row for row in pooler.show("config")}


@pytest.fixture(scope="module")
def example():
    parser = configparser.RawConfigParser(comment_prefixes=";", strict=True)
    parser.read_string(EXAMPLE.read_text())
    return parser


def test_every_setting_is_in_force(example, config, pooler):
    told = dict(example["pgbouncer"])
    assert len(told) > 10
    assert told["pool_mode"] == "transaction"
    in_force = {name: config[name]["value"] for name in told}
    assert {name for name in told if told[name] != in_force[name]} == OURS
    assert not re.search("WARNING|ERROR|FATAL", pooler.log())


def test_what_is_commented_out_is_known_and_defaults_are_what_it_says(config):
    text = EXAMPLE.read_text()
    names = dict(re.findall(r"(?m)^;(\w+) = (.*)", text))
    assert len(names) > 5
    assert set(names) <= set(config)
    (defaults,) = re.findall(r"These are the defaults:\n((?:;.*\n)+)", text)
    for name, value in re.findall(r";(\w+) = (.*)", defaults):
        assert config[name]["default"] == value
    for name, value in {"max_client_conn": "100", "server_idle_timeout": "600", "server_login_retry": "15"}.items():
        assert float(config[name]["default"]) == float(value)
        assert re.search(r"default[\w ,]* %s\b" % value, text)


def test_all_databases_are_there_and_postgres_has_a_small_pool(example, server, pooler):
    assert dict(example["databases"]) == {"postgres": EXAMPLE_SERVER + " pool_size=5", "*": EXAMPLE_SERVER}
    server.execute("CREATE DATABASE another")
    sizes = {}
    for name in ("postgres", "another"):
        with contextlib.closing(pooler.connect(name)) as connection, connection.cursor() as cr:
            cr.execute("SELECT current_database()")
            assert cr.fetchall() == [(name,)]
            # PgBouncer forgets a database of "*" as soon as nobody is connected to it.
            (sizes[name],) = [row["pool_size"] for row in pooler.show("databases") if row["name"] == name]
    assert (sizes["postgres"], sizes["another"]) == (5, int(example["pgbouncer"]["default_pool_size"]))


def test_psycopg2_needs_no_parameter_to_be_ignored(server):
    with PgBouncer(server, settings={"ignore_startup_parameters": ""}) as pooler:
        # Odoo gives its name, from 18.0 on.
        with contextlib.closing(pooler.connect(application_name="odoo-1")) as connection:
            connection.set_isolation_level(2)
            connection.cursor().execute("SELECT 1")


def test_settings_and_databases_of_a_test_come_on_top(server):
    settings = {"default_pool_size": 3}
    with PgBouncer(server, settings=settings, databases={"postgres": "pool_mode=session"}) as pooler:
        config = {row["key"]: row["value"] for row in pooler.show("config")}
        # And the others are still those of the example.
        assert (config["default_pool_size"], config["max_client_conn"]) == ("3", "1000")
        (postgres,) = [row for row in pooler.show("databases") if row["name"] == "postgres"]
        assert (postgres["pool_mode"], postgres["pool_size"]) == ("session", 3)


class Including(PgBouncer):
    """A pooler with a file of its own, which includes the example."""

    def _write_configuration(self):
        super()._write_configuration()
        example = (self.folder / "pgbouncer.ini").rename(self.folder / "example.ini")
        self._write("pgbouncer.ini", ["%%include %s" % example, *self.own])


def test_it_can_be_included_as_it_says(server):
    with contextlib.closing(Including(server)) as pooler:
        pooler.own = ["default_pool_size = 4", "[databases]", "nowhere = host=db-02"]
        pooler.start()
        config = {row["key"]: row["value"] for row in pooler.show("config")}
        assert (config["default_pool_size"], config["max_client_conn"]) == ("4", "1000")
        assert {"postgres", "nowhere"} <= {row["name"] for row in pooler.show("databases")}
        assert not re.search("WARNING|ERROR|FATAL", pooler.log())
        # What it warns of.
        pooler.own = ["[pgbouncer]", "admin_users = pgbouncer"]
        pooler.reload()
        config = {row["key"]: row["value"] for row in pooler.show("config")}
        assert (config["default_pool_size"], config["max_client_conn"]) == ("20", "100")
