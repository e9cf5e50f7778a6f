# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""Answer ``GET /bus_alt_connection/health`` with the state of this process's listener, as JSON.

Anybody may ask, so the answer does not mention hosts, accounts or databases.
"""

import json

from odoo import http

from . import log, patch
from .supervisor import DEAF, LISTENING, POLLING, SHARED

# The status for each mode, the worst first. The mode of a process without a listener is None.
_STATUS = ((DEAF, "fail"), (POLLING, "degraded"), (LISTENING, "pass"), (SHARED, "pass"), (None, "pass"))
_WORST_FIRST = ("fail", "degraded", "pass")
_NO_LISTENER = {
    "mode": None,
    "problem": None,
    "listening": False,
    "confirmed": False,
    "seconds_since_check": None,
    "round_trip_ms": None,
    "reconnects": 0,
    "counters": dict.fromkeys(log.COUNTERS, 0),
}


class Health(http.Controller):
    @http.route("/bus_alt_connection/health", type="http", auth="none", methods=["GET"], csrf=False, save_session=False)
    def health(self, **_query):
        """Return 503 if notifications do not reach clients ("fail"), else 200.

        "degraded" means that they arrive late, or that ``problem`` may keep them from arriving.
        """
        found = [supervisor.status() for supervisor in patch.supervisors()] or [_NO_LISTENER]
        worst = min(found, key=_severity)
        status = _status(worst)
        code = 503 if status == "fail" else 200
        counters = {name: sum(each["counters"][name] for each in found) for name in log.COUNTERS}
        body = json.dumps(dict(worst, status=status, counters=counters))
        return http.Response(body, code, [("Cache-Control", "no-store")], content_type="application/json")


def _status(state):
    """Return the status for ``state``, a result of `Supervisor.status`: a word of `_WORST_FIRST`."""
    status = dict(_STATUS)[state["mode"]]
    return "degraded" if status == "pass" and state["problem"] else status


def _severity(state):
    """Return a sort key for ``state``, a result of `Supervisor.status`: the worst first."""
    modes = [mode for mode, _name in _STATUS]
    return _WORST_FIRST.index(_status(state)), modes.index(state["mode"]), state["problem"] is None
