"""docs/pgbouncer.ini is what all tests run on; and PgBouncer takes from it what it says."""

import configparser
import contextlib
import re

from stack.pgbouncer import EXAMPLE, EXAMPLE_SERVER

#: what a test's pooler must have otherwise
OURS = {"listen_port", "auth_file", "server_login_retry"}


def test_every_setting_is_in_force_and_postgres_has_a_small_pool(server, pooler):
    example = configparser.RawConfigParser(comment_prefixes=";", strict=True)
    example.read_string(EXAMPLE.read_text())
    told, found = dict(example["pgbouncer"]), {row["key"]: row["value"] for row in pooler.show("config")}
    assert len(told) > 10 and told["pool_mode"] == "transaction"
    assert {name for name in told if told[name] != found[name]} == OURS
    assert not re.search("WARNING|ERROR|FATAL", pooler.log())

    assert dict(example["databases"]) == {"postgres": EXAMPLE_SERVER + " pool_size=5", "*": EXAMPLE_SERVER}
    server.execute("CREATE DATABASE another")
    for name in ("postgres", "another"):
        with contextlib.closing(pooler.connect(name)) as connection, connection.cursor() as cr:
            cr.execute("SELECT current_database()")
            assert cr.fetchall() == [(name,)]
    assert [row["pool_size"] for row in pooler.show("databases") if row["name"] == "postgres"] == [5]
