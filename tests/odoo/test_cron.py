"""Scheduled actions: their trigger gets through, and their work stays on the pooler."""

import re

import pytest

from stack.waiting import wait_until
from tests.support import traffic
from tests.support.actions import ScheduledAction

# Seconds. Without a notification Odoo looks for work once a minute.
AT_ONCE = 10

# Up to 14.0 nothing can be triggered.
pytestmark = pytest.mark.variants(since=15)


@pytest.mark.matrix
def test_a_triggered_action_runs_at_once_and_on_the_pooler(stack):
    action = ScheduledAction(stack)
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
    action = ScheduledAction(stack)
    mark = stack.server.log_mark()
    action.trigger()
    said = [one for one in traffic.statements(stack, mark) if re.search("(?i)notify.*cron_trigger", one.text)]
    assert said
    assert all(one.pooled for one in said)
    wait_until(action.has_run, AT_ONCE, "the action to run", tail=stack.odoo.log_tail)


def test_without_the_addon_a_triggered_action_waits_for_the_timer(new_stack):
    stack = new_stack(addon=None)
    action = ScheduledAction(stack)
    action.trigger()
    with pytest.raises(TimeoutError):
        wait_until(action.has_run, 4, "the action to run")
