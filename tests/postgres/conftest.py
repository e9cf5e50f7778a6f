"""Servers for tests that need no Odoo."""

import pytest

from stack.pgbouncer import PgBouncer
from stack.postgres import PostgreSQL


@pytest.fixture(scope="module")
def server():
    """A PostgreSQL, shared by the tests of a module."""
    with PostgreSQL() as server:
        yield server


@pytest.fixture(scope="module")
def pooler(server):
    """A PgBouncer in front of ``server``, be it this one or one of the module's own."""
    with PgBouncer(server) as pooler:
        yield pooler
