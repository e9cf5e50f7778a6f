# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""``GET /bus_alt_connection/health``: how this process's listener is, as JSON.

Anybody may ask, so nothing is told of hosts, accounts or databases.
"""

import json

from odoo import http

from . import patch
from .supervisor import DEAF, LISTENING, POLLING, SHARED

# By mode, the worst first; None: a process that has no listener, and needs none.
_STATUS = ((DEAF, "fail"), (POLLING, "degraded"), (LISTENING, "pass"), (SHARED, "pass"), (None, "pass"))
_NO_LISTENER = {"mode": None, "listening": False, "confirmed": False}
_NO_LISTENER.update(seconds_since_check=None, round_trip_ms=None, reconnects=0)


class Health(http.Controller):
    @http.route("/bus_alt_connection/health", type="http", auth="none", methods=["GET"], csrf=False, save_session=False)
    def health(self, **_query):
        """Return 200 if notifications reach clients in time, else 503."""
        found = [supervisor.status() for supervisor in patch.supervisors()] or [_NO_LISTENER]
        status, worst = next((name, one) for mode, name in _STATUS for one in found if one["mode"] == mode)
        code = 503 if status == "fail" else 200
        body = json.dumps(dict(worst, status=status))
        return http.Response(body, code, [("Cache-Control", "no-store")], content_type="application/json")
