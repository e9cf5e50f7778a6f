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

_logger = logging.getLogger(__name__)


def by_itself(database):
    """LISTEN on the cursor that most code gets, and write with the ORM on it, with and without a commit."""
    with _environments(), contextlib.closing(Registry(database).cursor()) as cr:
        cr.execute(sql.SQL("LISTEN {}").format(sql.Identifier("by_itself")))
        cr.commit()
        for number, name in enumerate(("committed", "given up")):
            env = api.Environment(cr, SUPERUSER_ID, {})
            _logger.info("by_itself: the cursor of the environment is %s", "the same" if env.cr is cr else "another")
            partner = env["res.partner"].search([], limit=1, order="id")
            with cr.savepoint():
                partner.write({"name": "by_itself: %s" % name})
            # Of the commit or rollback, not of the savepoint.
            _tell_hooks(cr)
            cr.execute("SELECT %s AS found", (partner.name,))
            _logger.info("by_itself: found %s", cr.dictfetchall()[0]["found"])
            # It stays in Odoo's cache until Odoo flushes that, which is when the transaction ends.
            env["res.country"].search([], limit=1, order="id").write({"phone_code": 4711 + number})
            if name == "committed":
                cr.commit()
            else:
                cr.rollback()
        # What only a connection of psycopg2's has.
        _logger.info("by_itself: the encoding is %s", cr._cnx.encoding)
        _receive_on(cr._cnx)


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


def _environments():
    """Return a context for environments, which threads needed up to 14.0."""
    manage = getattr(api.Environment, "manage", contextlib.suppress)
    return manage()


def _tell_hooks(cr):
    """Have the hooks of a transaction say that they run."""
    if hasattr(cr, "precommit"):
        for name in ("precommit", "postcommit", "prerollback", "postrollback"):
            getattr(cr, name).add(lambda name=name: _logger.info("by_itself: hook %s", name))
    else:  # up to 13.0
        for name in ("commit", "rollback"):
            cr.after(name, lambda name=name: _logger.info("by_itself: hook post%s", name))


def _receive_on(connection):
    while True:
        select.select([connection], [], [], 60)
        connection.poll()
        while connection.notifies:
            notification = connection.notifies.pop(0)
            if notification.payload == "end":
                return
            _logger.info("%s received %s", notification.channel, notification.payload)
