"""A graceful reload (SIGHUP) of a prefork server loses nothing and leaves nothing behind."""

import os
import signal

import pytest

from stack.stack import Stack
from stack.waiting import wait_until
from tests.support.addonlog import bus_pid, troubles, wait_until_confirmed
from tests.support.flow import flowing
from tests.support.machine import Machine

pytestmark = pytest.mark.rest

RELOADS = 2
# Seconds. A cron worker of Odoo that handles the signal to end a moment after it was woken up by it sleeps once more,
# for a minute and up to 10 s.
END_OF_WORKERS = 80


def environment(stack):
    # Odoo executes itself by the name of its interpreter alone, and Python looks on PATH for what belongs to it.
    folder = os.path.dirname(str(stack.build.command[0]))
    return {"PATH": os.pathsep.join([folder, os.environ["PATH"]]), "IMDISPATCHER_CHECK_INTERVAL": "3"}


def reload(odoo):
    """Have Odoo reload itself; returns once the old server is gone and the new one answers."""
    mark = odoo.log_mark()
    os.kill(odoo.pid, signal.SIGHUP)
    odoo.wait_for_log("Old server stopped", mark, END_OF_WORKERS)
    assert "Server reload timed out" not in odoo.log_since(mark)
    wait_until(lambda: odoo.processes().gevent and odoo.is_up(), 60, "all of Odoo to answer", 0.1, odoo.log_tail)


def descriptors(odoo):
    """Return how many descriptors are open in the server, which a reload keeps: it executes itself."""
    return len(os.listdir("/proc/%d/fd" % odoo.processes().main))


def test_reloads_lose_nothing_and_leave_nothing_behind():
    with Stack("19.0", 2, jobs=False, environment=environment) as stack:
        with stack.client(["reload"], listening=False) as client:
            machine = Machine(stack)
            machine.settle(deadline=30)
            before = descriptors(stack.odoo)
            with flowing(stack, client, "reload", 0.05, 20):
                for count in range(1, RELOADS + 1):
                    mark = stack.odoo.log_mark()
                    reload(stack.odoo)
                    wait_until_confirmed(stack, mark)
                    assert machine.settle(deadline=30) == bus_pid(stack)
                    assert stack.odoo.health()["status"] == "pass"
                    client.wait_for_count(100 * count, 60)
            assert len(client.failures) >= RELOADS
        wait_until(lambda: descriptors(stack.odoo) <= before, 20, "as few descriptors as %d" % before, 0.2)
        assert troubles(stack) == []
        assert stack.odoo.stop(END_OF_WORKERS) == 0
