"""The ways in which addons say LISTEN.

Each function listens on the channel that is called as itself, until that is notified of ``end``.
"""

import contextlib
import logging
import select

from odoo import SUPERUSER_ID, api
from odoo.modules.registry import Registry
from odoo.sql_db import db_connect
from psycopg2 import sql

try:
    from odoo.tools import SQL
except ImportError:  # up to 16.0
    SQL = None

_logger = logging.getLogger(__name__)


def formatted(database):
    channel = "formatted"
    with db_connect(database).cursor() as cr:
        cr.execute(f"LISTEN {channel}")
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


def wanting_more(database):
    """LISTEN, and use what only a connection of psycopg2's has."""
    with db_connect(database).cursor() as cr:
        cr.execute("LISTEN wanting_more")
        cr.commit()
        _logger.info("wanting_more encodes in %s", cr._cnx.encoding)
        _receive(cr)


def writing(database):
    """LISTEN, and write with the ORM on the same cursor, with and without a transaction that goes before."""
    with _environments(), db_connect(database).cursor() as cr:
        cr.execute("LISTEN writing")
        cr.commit()
        for number, name in enumerate(("committed", "given up")):
            env = api.Environment(cr, SUPERUSER_ID, {})
            _logger.info("writing: the cursor of the environment is %s", "the same" if env.cr is cr else "another")
            partner = env["res.partner"].search([], limit=1, order="id")
            with cr.savepoint():
                partner.write({"name": "writing: %s" % name})
            # Of the commit or rollback, not of the savepoint.
            _tell_hooks(cr)
            cr.execute("SELECT %s AS found", (partner.name,))
            _logger.info("writing: found %s", cr.dictfetchall()[0]["found"])
            # It stays in Odoo's cache until Odoo flushes that, which is when the transaction ends.
            env["res.country"].search([], limit=1, order="id").write({"phone_code": 4711 + number})
            if name == "committed":
                cr.commit()
            else:
                cr.rollback()
        _receive(cr)


def handed_on(database):
    """LISTEN on a cursor that another function has opened, whose connection is fetched before."""
    with _environments(), contextlib.closing(_open(database)) as cr:
        connection = cr._cnx
        _listen(cr, "handed_on")
        env = api.Environment(cr, SUPERUSER_ID, {})
        env["res.partner"].search([], limit=1, order="id").write({"name": "handed on"})
        cr.commit()
        _receive_on(connection)


def _open(database):
    return db_connect(database).cursor()


def _listen(cr, channel):
    cr.execute("LISTEN " + channel)
    cr.commit()


def only_ask(database):
    """Listen for nothing, and return the port that the server sees us at."""
    with db_connect(database).cursor() as cr:
        cr.execute("SELECT inet_client_port()")
        return cr.fetchone()[0]


def _environments():
    """Return a context for environments, which threads needed up to 14.0."""
    manage = getattr(api.Environment, "manage", contextlib.suppress)
    return manage()


def _tell_hooks(cr):
    """Have the hooks of a transaction say that they run."""
    if hasattr(cr, "precommit"):
        for name in ("precommit", "postcommit", "prerollback", "postrollback"):
            getattr(cr, name).add(lambda name=name: _logger.info("writing: hook %s", name))
    else:  # up to 13.0
        for name in ("commit", "rollback"):
            cr.after(name, lambda name=name: _logger.info("writing: hook post%s", name))


def _receive(cr):
    _receive_on(cr._cnx)


def _receive_on(connection):
    while True:
        select.select([connection], [], [], 60)
        connection.poll()
        while connection.notifies:
            notification = connection.notifies.pop(0)
            if notification.payload == "end":
                return
            _logger.info("%s received %s", notification.channel, notification.payload)
