"""Scheduled actions: their trigger gets through, and their work stays on the pooler."""

import re
import uuid
import xmlrpc.client

import pytest

from stack.database import LOGIN, PASSWORD
from stack.waiting import wait_until
from tests.support import traffic

# Seconds. Without a notification Odoo looks for work once a minute.
AT_ONCE = 10

# Up to 14.0 nothing can be triggered.
pytestmark = pytest.mark.variants(since=15)


@pytest.mark.matrix
def test_a_triggered_action_runs_at_once_and_on_the_pooler(stack):
    action = _Action(stack)
    mark = stack.server.log_mark()
    action.trigger()
    wait_until(action.has_run, AT_ONCE, "the action to run", tail=stack.odoo.log_tail)
    said = traffic.statements(stack, mark)
    assert [one.pooled for one in said if action.token in one.text] == [True]
    # What Odoo does for a job it does on the pooler too: to find, lock and mark it.
    kept = [one for one in said if "ir_cron" in one.text]
    assert kept
    assert all(one.pooled for one in kept)


@pytest.mark.matrix
def test_the_trigger_itself_takes_the_pooler(stack):
    action = _Action(stack)
    mark = stack.server.log_mark()
    action.trigger()
    said = [one for one in traffic.statements(stack, mark) if re.search("(?i)notify.*cron_trigger", one.text)]
    assert said
    assert all(one.pooled for one in said)
    wait_until(action.has_run, AT_ONCE, "the action to run", tail=stack.odoo.log_tail)


def test_without_the_addon_a_triggered_action_waits_for_the_timer(new_stack):
    stack = new_stack(addon=None)
    action = _Action(stack)
    action.trigger()
    with pytest.raises(TimeoutError):
        wait_until(action.has_run, 4, "the action to run")


class _Action:
    """A scheduled action of next year's, which says a word of its own to the database when it runs."""

    def __init__(self, stack):
        self.token = uuid.uuid4().hex
        self._stack = stack
        self._call = _log_in(stack)
        # A trigger that comes before cron listens waits for the timer.
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
        """Have Odoo trigger it, as addons do."""
        fields = {
            "name": "trigger",
            "model_id": self._call("ir.model", "search", [[["model", "=", "ir.cron"]]])[0],
            "state": "code",
            "code": "env['ir.cron'].browse(%d)._trigger()" % self.id,
        }
        action = self._call("ir.actions.server", "create", [fields])
        self._call("ir.actions.server", "run", [[action]])

    def has_run(self):
        return any(one.text == "SELECT '%s'" % self.token for one in traffic.statements(self._stack))


def _log_in(stack):
    url = stack.odoo.http_url + "/xmlrpc/2/"
    with xmlrpc.client.ServerProxy(url + "common") as common:
        uid = common.authenticate(stack.database, LOGIN, PASSWORD, {})

    def call(model, method, arguments):
        with xmlrpc.client.ServerProxy(url + "object", allow_none=True) as proxy:
            return proxy.execute_kw(stack.database, uid, PASSWORD, model, method, arguments)

    return call
