"""Has Odoo 19.0 dispatch as Odoo 20.0 does (commit 3d9a63e0).

Its ``BusDispatcher`` makes a tuple of a channel, but not of lists inside it, and looks the channel up outside of its
``try``. After an error it pauses for 20 to 30 s. Its worker takes a cursor for each look-up.
"""

import logging
import queue
import random
import selectors
import threading

from odoo import release
from odoo.addons.bus import websocket
from odoo.addons.bus.models import bus, ir_websocket
from odoo.addons.bus.tools import orjson
from odoo.sql_db import db_connect

# Seconds
POLL_TIMEOUT = 50
ERROR_RETRY_DELAY = 20
ERROR_RETRY_JITTER = 10

_logger = logging.getLogger(__name__)


class BusDispatcher(bus.ImDispatch):
    def __init__(self):
        super().__init__()
        self._pending = queue.Queue()

    def run(self):
        threading.Thread(target=self._worker_loop, daemon=True).start()
        while not bus.stop_event.is_set():
            try:
                self._listener_loop()
            except Exception:
                _logger.exception("the dispatcher failed")
            bus.stop_event.wait(ERROR_RETRY_DELAY + random.uniform(0, ERROR_RETRY_JITTER))

    def _listener_loop(self):
        with db_connect("postgres").cursor() as cr, selectors.DefaultSelector() as selector:
            cr.execute("listen imbus")
            cr.commit()
            selector.register(cr._cnx, selectors.EVENT_READ)
            while not bus.stop_event.is_set():
                if selector.select(POLL_TIMEOUT):
                    self._queue(cr._cnx)

    def _queue(self, connection):
        connection.poll()
        by_database = {}
        while connection.notifies:
            for channel in orjson.loads(connection.notifies.pop().payload):
                try:
                    found = by_database.setdefault(channel[0], [])
                    found.append(tuple(channel) if isinstance(channel, list) else channel)
                except (IndexError, TypeError):
                    pass
        for database, channels in by_database.items():
            for channel in channels:
                if channel in self._channels_to_ws:
                    self._pending.put((database, channel))

    def _worker_loop(self):
        while True:
            database, channel = self._pending.get()
            with db_connect(database).cursor() as cr:
                cr.execute("SELECT 'worker'")
            for one in list(self._channels_to_ws.get(channel, ())):
                one.trigger_notification_dispatching()


def post_load():
    # bus_alt_connection looks at it when it makes its listener.
    release.version_info = (20, *release.version_info[1:])
    bus.dispatch = ir_websocket.dispatch = websocket.dispatch = BusDispatcher()
