"""Which servers are used, and which packages those are put together from that the machine does not have."""

import contextlib
from pathlib import Path

import pytest

from stack import debian, postgres, servers
from stack.pgbouncer import PgBouncer


@pytest.mark.parametrize("name", ["libc6", "libpq5", "libssl3t64", "libgssapi-krb5-2", "zlib1g", "libxml2-16"])
def test_the_libraries_that_programs_load_are_fetched(name):
    assert debian._LIBRARY.fullmatch(name)


@pytest.mark.parametrize(
    "name", ["libperl5.42", "libjson-perl", "libllvm19", "libz3-4", "libc-bin", "locales", "perl-base", "postgresql-18"]
)
def test_what_they_do_not_load_is_not_fetched(name):
    assert not debian._LIBRARY.fullmatch(name)


def test_a_version_that_debian_does_not_have_is_refused():
    with pytest.raises(RuntimeError, match="PostgreSQL 9"):
        servers.postgres_programs("9")


@pytest.fixture
def chosen(monkeypatch):
    """Return a function that sets the environment variables; nothing is downloaded or run."""
    monkeypatch.setattr(servers, "unpacked_program", lambda suite, names, path: Path("/", suite, names[0], path))
    monkeypatch.setattr(servers.system, "postgres_bin", lambda: Path("/machine"))
    monkeypatch.setattr(servers.system, "pgbouncer_bin", lambda: Path("/machine/pgbouncer"))
    monkeypatch.setattr(postgres, "run", lambda command: "postgres (PostgreSQL) %s" % command[0])

    def chosen(**variables):
        for name in ("POSTGRESQL", "PGBOUNCER"):
            monkeypatch.setenv(name, variables.get(name, ""))

    return chosen


def test_without_a_choice_all_is_the_machines_own(chosen):
    chosen()
    assert postgres.full_version() == "/machine/postgres"
    assert servers.pgbouncer_program() == Path("/machine/pgbouncer")


def test_a_choice_reaches_all_servers(chosen):
    chosen(POSTGRESQL="17", PGBOUNCER="sid")
    assert postgres.full_version() == "/trixie/postgresql-17/usr/lib/postgresql/17/bin/postgres"
    with contextlib.closing(postgres.PostgreSQL()) as server:
        assert server.command()[0] == Path("/trixie/postgresql-17/usr/lib/postgresql/17/bin/postgres")
        with contextlib.closing(PgBouncer(server)) as pooler:
            assert pooler.command()[0] == Path("/sid/pgbouncer/usr/sbin/pgbouncer")


def test_what_is_asked_for_by_its_name_does_not_depend_on_the_choice(chosen):
    chosen(POSTGRESQL="17", PGBOUNCER="trixie")
    assert servers.postgres_programs("18") == Path("/sid/postgresql-18/usr/lib/postgresql/18/bin")
    assert servers.pgbouncer_program("sid") == Path("/sid/pgbouncer/usr/sbin/pgbouncer")


@pytest.mark.parametrize(("variable", "value"), [("POSTGRESQL", "9"), ("POSTGRESQL", "sid"), ("PGBOUNCER", "1.24")])
def test_a_choice_that_there_is_not_is_refused_in_one_line(chosen, variable, value):
    chosen(**{variable: value})
    for ask in (servers.check, servers.postgres_programs if variable == "POSTGRESQL" else servers.pgbouncer_program):
        with pytest.raises(RuntimeError, match="^%s=%s: Debian's packages have [^\n]*$" % (variable, value)):
            ask()


def test_the_newest_are_among_those_to_choose_from():
    servers.check(servers.NEWEST)
