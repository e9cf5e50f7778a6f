"""What Odoo is made to do by itself, as its user does, from outside."""

import uuid
import xmlrpc.client

from stack.database import LOGIN, PASSWORD
from stack.odoo import series_number
from stack.sender import MESSAGE_TYPE
from tests.support import traffic


class ScheduledAction:
    """A scheduled action of next year's, which says a word of its own to the database when it runs."""

    def __init__(self, stack):
        self.token = uuid.uuid4().hex
        self._stack = stack
        self._call = caller(stack.odoo)
        # A trigger that comes before cron listens waits for the timer.
        if series_number(stack.series) >= 15:
            stack.wait_for_listen("cron_trigger")
        fields = {
            "name": self.token,
            "model_id": self._call("ir.model", "search", [[["model", "=", "res.partner"]]])[0],
            "state": "code",
            "code": "env.cr.execute(\"SELECT '%s'\")" % self.token,
            "interval_type": "weeks",
            "interval_number": 52,
            "nextcall": "2100-01-01 00:00:00",
        }
        self.id = self._call("ir.cron", "create", [fields])

    def trigger(self):
        """Have Odoo trigger it, as addons do; up to 14.0, where that is not known, it is only due."""
        if series_number(self._stack.series) >= 15:
            run_code(self._call, "env['ir.cron'].browse(%d)._trigger()" % self.id)
        else:
            self._call("ir.cron", "write", [[self.id], {"nextcall": "2000-01-01 00:00:00"}])

    def has_run(self):
        return any(one.text == "SELECT '%s'" % self.token for one in traffic.statements(self._stack))


def send(odoo, channel, message):
    """Have Odoo send on its bus."""
    if series_number(odoo.build.series) >= 15:
        code = "env['bus.bus']._sendone(%r, %r, %r)" % (channel, MESSAGE_TYPE, message)
    else:
        code = "env['bus.bus'].sendone(%r, %r)" % (channel, message)
    run_code(caller(odoo), code)


def run_code(call, code):
    """Have Odoo run a line of Python, as a server action."""
    fields = {
        "name": "tests",
        "model_id": call("ir.model", "search", [[["model", "=", "ir.cron"]]])[0],
        "state": "code",
        # Without an answer 12.0 gives None, for which plain XML-RPC has no word.
        "code": code + "\naction = {'type': 'ir.actions.act_window_close'}",
    }
    action = call("ir.actions.server", "create", [fields])
    call("ir.actions.server", "run", [[action]])


def caller(odoo):
    """Log in; return a function that calls a method of a model: ``call(model, method, arguments)``."""
    url = odoo.http_url + "/xmlrpc/2/"
    with xmlrpc.client.ServerProxy(url + "common") as common:
        uid = common.authenticate(odoo.database, LOGIN, PASSWORD, {})

    def call(model, method, arguments):
        with xmlrpc.client.ServerProxy(url + "object", allow_none=True) as proxy:
            return proxy.execute_kw(odoo.database, uid, PASSWORD, model, method, arguments)

    return call
