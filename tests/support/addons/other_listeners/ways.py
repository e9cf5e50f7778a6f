"""The ways in which addons say LISTEN.

Each function listens on the channel that is called as itself, until that is notified of ``end``.
"""

import contextlib
import logging
import select

from odoo.modules.registry import Registry
from odoo.sql_db import db_connect
from psycopg2 import sql
from psycopg2.extensions import AsIs

try:
    from odoo.tools import SQL
except ImportError:  # up to 16.0
    SQL = None

_logger = logging.getLogger(__name__)


def literal(database):
    with db_connect(database).cursor() as cr:
        cr.execute("LISTEN literal")
        cr.commit()
        _receive(cr)


def in_lower_case(database):
    with db_connect(database).cursor() as cr:
        cr.execute('listen "in_lower_case";')
        cr.commit()
        _receive(cr)


def put_together(database):
    channel = "put_together"
    with db_connect(database).cursor() as cr:
        cr.execute("LISTEN " + channel)
        cr.commit()
        _receive(cr)


def formatted(database):
    channel = "formatted"
    with db_connect(database).cursor() as cr:
        cr.execute(f"LISTEN {channel}")
        cr.commit()
        _receive(cr)


def formatted_in_quotes(database):
    channel = "formatted_in_quotes"
    with db_connect(database).cursor() as cr:
        cr.execute(f'LISTEN "{channel}"')
        cr.commit()
        _receive(cr)


def with_parameters(database):
    with db_connect(database).cursor() as cr:
        cr.execute("LISTEN %s", (AsIs("with_parameters"),))
        cr.commit()
        _receive(cr)


def composed(database):
    with db_connect(database).cursor() as cr:
        cr.execute(sql.SQL("LISTEN {}").format(sql.Identifier("composed")))
        cr.commit()
        _receive(cr)


def with_tools_sql(database):
    with db_connect(database).cursor() as cr:
        cr.execute(SQL("LISTEN %s", SQL.identifier("with_tools_sql")))
        cr.commit()
        _receive(cr)


def by_registry(database):
    """LISTEN on an Odoo database, with the cursor that most code gets."""
    with contextlib.closing(Registry(database).cursor()) as cr:
        cr.execute("LISTEN by_registry")
        cr.commit()
        _receive(cr)


def in_a_nested_function(database):
    cr = db_connect(database).cursor()

    def listen():
        cr.execute("LISTEN in_a_nested_function")
        cr.commit()

    with contextlib.closing(cr):
        listen()
        _receive(cr)


def wanting_more(database):
    """LISTEN, and use what only a connection of psycopg2's has."""
    with db_connect(database).cursor() as cr:
        cr.execute("LISTEN wanting_more")
        cr.commit()
        _logger.info("wanting_more encodes in %s", cr._cnx.encoding)
        _receive(cr)


def only_ask(database):
    """Listen for nothing, and return the port that the server sees us at."""
    with db_connect(database).cursor() as cr:
        cr.execute("SELECT inet_client_port()")
        return cr.fetchone()[0]


def _receive(cr):
    connection = cr._cnx
    while True:
        select.select([connection], [], [], 60)
        connection.poll()
        while connection.notifies:
            notification = connection.notifies.pop(0)
            if notification.payload == "end":
                return
            _logger.info("%s received %s", notification.channel, notification.payload)
