"""A dispatcher that treats its cursor, its connection and its payloads as the ``BusDispatcher`` of Odoo 20.0 does.

Unlike the dispatcher of 19.0, it listens on the database that the option ``db_system`` names. It ignores a channel that
has no first element, or a list as its first element; but any other list in a channel, as whatever is no JSON, makes it
fail, after which it pauses for 20 to 30 s.
"""

import json
import logging
import selectors
import threading

from odoo import release
from odoo.service.server import CommonServer
from odoo.sql_db import db_connect
from odoo.tools import config

_logger = logging.getLogger(__name__)

# Seconds; the loop needs as long to end.
POLL_TIMEOUT = 50
#: seconds of the pause after an error
ERROR_RETRY_DELAY = 20
#: what somebody has subscribed to
NAMES = ("sent", "missed")

stopped = threading.Event()


def run():
    while not stopped.is_set():
        try:
            listen()
        except Exception:
            if not stopped.is_set():
                _logger.exception("the dispatcher failed")
        stopped.wait(ERROR_RETRY_DELAY)


def listen():
    topics = {(config["db_system"], name) for name in NAMES}
    with db_connect(config["db_system"]).cursor() as cr, selectors.DefaultSelector() as selector:
        cr.execute("listen imbus")
        cr.commit()
        connection = cr._cnx
        selector.register(connection, selectors.EVENT_READ)
        while not stopped.is_set():
            if not selector.select(POLL_TIMEOUT):
                continue
            connection.poll()
            by_database = {}
            while connection.notifies:
                for channel in json.loads(connection.notifies.pop().payload):
                    try:
                        found = by_database.setdefault(channel[0], [])
                        found.append(tuple(channel) if isinstance(channel, list) else channel)
                    except (IndexError, TypeError):
                        _logger.info("ignored the channel %s", json.dumps(channel))
            for database, channels in by_database.items():
                fetch(database, {channel for channel in channels if channel in topics})


def fetch(database, topics):
    """Look up the messages, as workers of Odoo 20.0 do."""
    if topics:
        with db_connect(database).cursor() as cr:
            for topic in topics:
                channel = json.dumps(topic, separators=(",", ":"))
                cr.execute("SELECT message FROM bus_bus WHERE channel = %s ORDER BY id", (channel,))
                messages = [json.loads(message)["payload"] for (message,) in cr.fetchall()]
                _logger.info("on %s: %s", topic[1], ", ".join(messages))


def post_load():
    # bus_alt_connection looks at it when it makes its listener.
    release.version_info = (20, *release.version_info[1:])
    CommonServer.on_stop(stopped.set)
    threading.Thread(target=run, daemon=True, name=__name__).start()
