"""Poolers other than PgBouncer: real ones of :mod:`stack.poolers`, and a PgBouncer that looks like pgagroal."""

import pytest

from bus_alt_connection.connection import Connection


def skip_without(pooler):
    """Skip the test, with the reason, if the program of a class of poolers can not be had."""
    try:
        pooler.program()
    except RuntimeError as error:
        pytest.skip(str(error))


def hand_on_pid(monkeypatch):
    """Have the addon see poolers as if they told the pid of the server, so that they look like one."""
    examining = Connection.examining

    def unsuspicious(self):
        facts = yield from examining(self)
        return facts._replace(pooled=False)

    monkeypatch.setattr(Connection, "examining", unsuspicious)
