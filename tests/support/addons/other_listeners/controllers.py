"""What tests can ask a running Odoo to do. Loaded server-wide, it need not be installed."""

import logging
import threading

from odoo import SUPERUSER_ID, http
from odoo.http import request

from . import ways

_logger = logging.getLogger(__name__)


class OtherListeners(http.Controller):
    @http.route("/other_listeners/listen", type="http", auth="none")
    def listen(self, way, database):
        """Start one of the listeners of ``ways``; it ends when it is notified of ``end``."""
        threading.Thread(target=_run, args=(getattr(ways, way), database), name=way, daemon=True).start()
        return "started"

    @http.route("/other_listeners/ask", type="http", auth="none")
    def ask(self, seconds="0"):
        """Work on the database for some seconds, and return the port that the server saw this request at."""
        request.env.cr.execute("SELECT inet_client_port() FROM pg_sleep(%s)", (float(seconds),))
        return str(request.env.cr.fetchone()[0])

    @http.route("/other_listeners/ask_system", type="http", auth="none")
    def ask_system(self):
        """Return the port that the server saw a mere query on database postgres at."""
        return str(ways.only_ask("postgres"))

    @http.route("/other_listeners/send", type="http", auth="none")
    def send(self, channel, message):
        """Send on the bus, the way that any code of Odoo's does."""
        bus = request.env(user=SUPERUSER_ID)["bus.bus"]
        if hasattr(bus, "_sendone"):
            bus._sendone(channel, "other_listeners", message)
        else:  # up to 14.0
            bus.sendone(channel, message)
        return "sent"


def _run(way, database):
    # As Odoo's own listeners start again whatever happens; this one only once.
    for _ in range(2):
        try:
            return way(database)
        except Exception as error:
            _logger.info("%s ended with %s", way.__name__, type(error).__name__)
