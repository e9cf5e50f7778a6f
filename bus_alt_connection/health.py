# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""``GET /bus_alt_connection/health``: how this process's listener is, as JSON.

Anybody may ask, so nothing is told of hosts, accounts or databases.
"""

import json

from odoo import http

from . import factory

_WORST_FIRST = ("fail", "degraded", "pass")
# Of a process that has no listener, and needs none.
_NO_LISTENER = {
    "status": "pass",
    "listening": False,
    "confirmed": False,
    "seconds_since_check": None,
    "round_trip_ms": None,
    "reconnects": 0,
}


class Health(http.Controller):
    @http.route(
        "/bus_alt_connection/health",
        type="http",
        auth="none",
        methods=["GET"],
        csrf=False,
        save_session=False,
    )
    def health(self, **_query):
        """Return 200 if notifications reach clients in time, else 503."""
        found = [supervisor.status() for supervisor in factory.supervisors()]
        found.sort(key=lambda status: _WORST_FIRST.index(status["status"]))
        status = found[0] if found else _NO_LISTENER
        return http.Response(
            json.dumps(status),
            status=503 if status["status"] == "fail" else 200,
            content_type="application/json",
            headers=[("Cache-Control", "no-store")],
        )
