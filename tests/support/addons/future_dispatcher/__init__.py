"""A dispatcher that treats its cursor, its connection and its payloads as the ``BusDispatcher`` of Odoo 20.0 does.

Unlike the dispatcher of 19.0, it listens on the database that the option ``db_system`` names, and leaves it to workers
to look up the messages. Its ``try`` ends before it looks up a channel: it ignores a channel that has no first element,
or a list as its first element; but any other list in a channel makes it pause for 20 to 30 s, as does whatever is no
JSON. A worker pauses for 5 s if the database fails, and as long as the listener if anything else does.
"""

import collections
import json
import logging
import queue
import random
import selectors
import threading

import psycopg2
from odoo import release
from odoo.service.server import CommonServer
from odoo.sql_db import db_connect
from odoo.tools import config

_logger = logging.getLogger(__name__)

# Seconds; the loops need as long to end.
POLL_TIMEOUT = 50
#: pause of a worker after an error of its database
BATCH_RETRY_DELAY = 5
#: pause of listener and workers after any other error
ERROR_RETRY_DELAY = (20, 30)

#: what somebody has subscribed to
NAMES = ("sent", "missed")


class Dispatcher:
    def __init__(self):
        self.stopped = threading.Event()
        self.topics = {(config["db_system"], name) for name in NAMES}
        self.lock = threading.Lock()
        #: topics to look up, by database
        self.pending = collections.defaultdict(set)
        #: databases with pending topics
        self.databases = queue.Queue()

    def start(self):
        for loop in (self._listen, self._work):
            name = "%s.%s" % (__name__, loop.__name__)
            threading.Thread(target=self._run, args=(loop,), daemon=True, name=name).start()

    def _run(self, loop):
        while not self.stopped.is_set():
            try:
                loop()
            except Exception:
                if not self.stopped.is_set():
                    _logger.exception("%s failed", loop.__name__)
            self.stopped.wait(random.uniform(*ERROR_RETRY_DELAY))

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
                        try:
                            by_database[channel[0]].append(tuple(channel) if isinstance(channel, list) else channel)
                        except (IndexError, TypeError):
                            _logger.info("ignored the channel %s", json.dumps(channel))
                for channels in by_database.values():
                    self._queue([channel for channel in channels if channel in self.topics])

    def _queue(self, topics):
        with self.lock:
            for topic in topics:
                if not self.pending[topic[0]]:
                    self.databases.put(topic[0])
                self.pending[topic[0]].add(topic)

    def _work(self):
        while not self.stopped.is_set():
            try:
                database = self.databases.get(timeout=POLL_TIMEOUT)
            except queue.Empty:
                continue
            with self.lock:
                topics = self.pending.pop(database)
            try:
                with db_connect(database).cursor() as cr:
                    for topic in topics:
                        _logger.info("on %s: %s", topic[1], ", ".join(self._fetch(cr, topic)))
            except psycopg2.Error:
                _logger.exception("can't fetch messages from %s", database)
                self.stopped.wait(BATCH_RETRY_DELAY)
                self._queue(topics)

    def _fetch(self, cr, topic):
        channel = json.dumps(topic, separators=(",", ":"))
        cr.execute("SELECT message FROM bus_bus WHERE channel = %s ORDER BY id", (channel,))
        return [json.loads(message)["payload"] for (message,) in cr.fetchall()]


def post_load():
    # bus_alt_connection looks at it when it makes its listener.
    release.version_info = (20, *release.version_info[1:])
    dispatcher = Dispatcher()
    CommonServer.on_stop(dispatcher.stopped.set)
    dispatcher.start()
