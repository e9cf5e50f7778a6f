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

    # The load of a benchmark

    @http.route("/other_listeners/read", type="http", auth="none")
    def read(self):
        request.env.cr.execute("SELECT pg_sleep(0.005)")
        return "read"

    @http.route("/other_listeners/send", type="http", auth="none")
    def send(self, message):
        request.env(user=SUPERUSER_ID)["bus.bus"]._sendone("load", "other_listeners", message)
        return "sent"


def _run(way, database):
    # As Odoo's own listeners start again whatever happens; this one only once.
    for _ in range(2):
        try:
            return way(database)
        except Exception as error:
            _logger.info("%s ended with %s", way.__name__, type(error).__name__)
