"""What Odoo is made to do by itself, as its user does, from outside."""

import uuid

from stack.odoo import series_number
from stack.sender import MESSAGE_TYPE
from tests.support import traffic


class ScheduledAction:
    """A scheduled action of next century's, which says a word of its own to the database when it runs."""

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
            "nextcall": "2100-01-01 00:00:00",
        }
        # Up to 17.0 an action runs once by default.
        fields.update({"numbercall": -1} if series_number(stack.series) < 18 else {})
        self.id = self._call("ir.cron", "create", [fields])

    def trigger(self):
        """Have Odoo trigger it, as addons do; up to 14.0, where that is not known, it is only due."""
        if series_number(self._stack.series) >= 15:
            run_code(self._call, "env['ir.cron'].browse(%d)._trigger()" % self.id)
        else:
            self._call("ir.cron", "write", [[self.id], {"nextcall": "2000-01-01 00:00:00"}])

    def has_run(self, times=1):
        texts = [one.text for one in traffic.statements(self._stack)]
        return texts.count("SELECT '%s'" % self.token) >= times


def send(odoo, channel, messages):
    """Have Odoo send on its bus."""
    if series_number(odoo.build.series) >= 15:
        lines = ["env['bus.bus']._sendone(%r, %r, %r)" % (channel, MESSAGE_TYPE, message) for message in messages]
    else:
        lines = ["env['bus.bus'].sendone(%r, %r)" % (channel, message) for message in messages]
    run_code(caller(odoo), "\n".join(lines))


def run_code(call, code):
    """Have Odoo run lines of Python, as a server action."""
    fields = {
        "name": "tests",
        "model_id": call("ir.model", "search", [[["model", "=", "ir.cron"]]])[0],
        "state": "code",
        "code": code,
    }
    action = call("ir.actions.server", "create", [fields])
    call("ir.actions.server", "run", [[action]])


def caller(odoo):
    """Log in; return a function that calls a method of a model: ``call(model, method, arguments)``.

    It is a session of the web client: with XML-RPC Odoo hashes the password for each call, which takes its time.
    """
    session = odoo.log_in()

    def call(model, method, arguments):
        params = {"model": model, "method": method, "args": arguments, "kwargs": {}}
        answer = session.post(odoo.http_url + "/web/dataset/call_kw", json={"params": params}, timeout=60).json()
        assert "error" not in answer, answer["error"]
        return answer.get("result")  # 12.0 leaves out None

    return call
