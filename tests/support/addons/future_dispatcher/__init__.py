"""A dispatcher that treats its cursor, its connection and its payloads as the ``BusDispatcher`` of Odoo's master does.

Unlike that of 19.0 it listens on the database that the option ``db_system`` names, leaves it to another thread to look
up what there is for a channel, and pauses for 20 to 30 s if anything goes wrong: an empty channel, or a list in one.
"""

import collections
import json
import logging
import queue
import random
import selectors
import threading

from odoo.service.server import CommonServer
from odoo.sql_db import db_connect
from odoo.tools import config

_logger = logging.getLogger(__name__)

# Seconds; it takes the loop a while to end.
POLL_TIMEOUT = 50
RETRY_DELAY = (20, 30)

#: what somebody has subscribed to
NAMES = ("sent", "missed")


class Dispatcher(threading.Thread):
    def __init__(self):
        super().__init__(daemon=True, name="%s.listener" % __name__)
        self.stopped = threading.Event()
        self.channels = queue.Queue()
        self.topics = {(config["db_system"], name) for name in NAMES}
        self.worker = threading.Thread(target=self._work, daemon=True, name="%s.worker" % __name__)

    def run(self):
        self.worker.start()
        while not self.stopped.is_set():
            try:
                self._listen()
            except Exception:
                if not self.stopped.is_set():
                    _logger.exception("the listener failed")
            self.stopped.wait(random.uniform(*RETRY_DELAY))

    def _listen(self):
        with db_connect(config["db_system"]).cursor() as cr, selectors.DefaultSelector() as selector:
            cr.execute("listen imbus")
            cr.commit()
            connection = cr._cnx
            selector.register(connection, selectors.EVENT_READ)
            while not self.stopped.is_set():
                if not selector.select(POLL_TIMEOUT):
                    continue
                connection.poll()
                by_database = collections.defaultdict(list)
                while connection.notifies:
                    for channel in json.loads(connection.notifies.pop().payload):
                        by_database[channel[0]].append(tuple(channel) if isinstance(channel, list) else channel)
                for database, channels in by_database.items():
                    self.channels.put((database, [one for one in channels if one in self.topics]))

    def _work(self):
        while True:
            database, channels = self.channels.get()
            for channel in channels:
                with db_connect(database).cursor() as cr:
                    cr.execute(
                        "SELECT message FROM bus_bus WHERE channel = %s ORDER BY id",
                        (json.dumps(channel, separators=(",", ":")),),
                    )
                    messages = [json.loads(message)["payload"] for (message,) in cr.fetchall()]
                _logger.info("on %s: %s", channel[1], ", ".join(messages))


def post_load():
    dispatcher = Dispatcher()
    CommonServer.on_stop(dispatcher.stopped.set)
    dispatcher.start()
