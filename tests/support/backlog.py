"""Databases with a bus_bus, and what was missed there, asked for in one step."""

import psycopg2

from bus_alt_connection import connection
from bus_alt_connection.catchup import Backlog
from bus_alt_connection.lookup import Moment
from bus_alt_connection.tasks import Tasks
from stack.postgres import USER, libpq_parameters

INSERT = """
    INSERT INTO bus_bus (channel, message, create_date)
    VALUES (%s, '{}', now() AT TIME ZONE 'UTC' - %s * interval '1 second')
"""
#: seconds; a row so old is found by its transaction, or not at all
OLD = 7200


def create_table(server, database, schema="public"):
    """Create an empty bus_bus of Odoo's in a schema whose name is quoted, if need be."""
    columns = "id serial PRIMARY KEY, create_date timestamp, channel varchar, message varchar"
    server.execute("CREATE TABLE %s.bus_bus (%s)" % (schema, columns), dbname=database)
    server.execute("ALTER TABLE %s.bus_bus OWNER TO %s" % (schema, USER), dbname=database)


def create_database(server, name):
    server.execute("CREATE DATABASE %s OWNER %s" % (name, USER))
    create_table(server, name)


def write(server, database, channel, age=OLD):
    """Commit a row that looks ``age`` seconds old."""
    server.execute(INSERT, (channel, age), database)


class AskedBacklog(Backlog):
    """A backlog that is asked at a time of the test's own, ``now``, and for one database."""

    def __init__(self, server):
        super().__init__(lambda database: connection.opening(libpq_parameters(server, database)))
        self.now = 1000.0

    def missed(self, database, overlap=False):
        """Return the channels that it would give, once it is asked; raise what keeps it from asking.

        :param overlap: whether to look back by date as well, as after an outage
        """
        found = []
        self.add_pending([database], self.now, afresh=overlap)
        self._ask(database, found)
        if database in self._pending and str(self._pending[database].error).startswith("no answer"):
            # It gets more time.
            self._ask(database, found)
        if database in self.take_gone():
            raise psycopg2.OperationalError("%s is gone" % database)
        if database in self._pending:
            raise self._pending[database].error
        return found

    def _ask(self, database, found):
        tasks = Tasks()
        self._pending[database] = self._pending[database]._replace(due=self.now)
        self.start(tasks, lambda channels: found.extend(channels) or True, self.now)
        while tasks:
            tasks.run(float("inf"))

    def all_heard(self, snapshot, started):
        self.heard_up_to(Moment(snapshot, started), self.now)
