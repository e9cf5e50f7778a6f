"""Cron workers that listen as Odoo's own do, but use what a connection has had for them only in psycopg2 so far."""

import logging
import os

from odoo import sql_db
from odoo.service import server

_logger = logging.getLogger(__name__)


def start(self):
    os.nice(10)
    server.Worker.start(self)
    if self.multi.socket:
        self.multi.socket.close()
    self.dbcursor = sql_db.db_connect("postgres").cursor()
    self.dbcursor.execute("LISTEN cron_trigger")
    self.dbcursor.commit()
    _logger.info("a cron worker is served by a server of version %d", self.dbcursor._cnx.info.server_version)


def post_load():
    server.WorkerCron.start = start
