"""A graceful reload (SIGHUP) of a prefork server loses nothing and leaves nothing behind."""

import contextlib
import os
import signal
import threading

import pytest

from stack.stack import Stack
from stack.waiting import wait_until
from tests.support.addonlog import bus_pid, troubles, wait_until_confirmed
from tests.support.machine import Machine

pytestmark = pytest.mark.rest

VARIANT = ("19.0", 2)
RELOADS = 2
# Seconds. A cron worker of Odoo that handles the signal to end a moment after it was woken up by it sleeps once more,
# for a minute and up to 10 s.
END_OF_WORKERS = 80


def _environment(stack):
    # Odoo executes itself by the name of its interpreter alone, and Python looks on PATH for what belongs to it.
    folder = os.path.dirname(str(stack.build.command[0]))
    return {"PATH": os.pathsep.join([folder, os.environ["PATH"]]), "IMDISPATCHER_CHECK_INTERVAL": "3"}


def _reload(stack):
    """Have Odoo reload itself; returns once the old server is gone and the new one answers."""
    mark = stack.odoo.log_mark()
    os.kill(stack.odoo.pid, signal.SIGHUP)
    stack.odoo.wait_for_log("Old server stopped", mark, END_OF_WORKERS)
    assert "Server reload timed out" not in stack.odoo.log_since(mark)
    odoo = stack.odoo
    wait_until(lambda: odoo.processes().gevent and odoo.is_up(), 60, "all of Odoo to answer", 0.1, odoo.log_tail)


def _descriptors(stack):
    """Return how many descriptors are open in the server, which a reload keeps: it executes itself."""
    return len(os.listdir("/proc/%d/fd" % stack.odoo.processes().main))


@pytest.fixture
def stock_exit_code():
    """The exit code of Odoo without the addon after as many reloads."""
    with Stack(*VARIANT, addon=None, pooler=False, jobs=False, environment=_environment) as stack:
        for _ in range(RELOADS):
            _reload(stack)
        return stack.odoo.stop(END_OF_WORKERS)


class _Browser:
    """A client of the bus that comes back when its server has gone, as a browser does."""

    def __init__(self, stack):
        self._stack = stack
        self._last = stack.last_id()
        self._earlier = []
        self._client = stack.client(["reload"], self._last)

    @property
    def messages(self):
        return self._earlier + self._client.messages

    def come_back(self):
        wait_until(lambda: self._client.failures, 20, "the old server to close the websocket")
        self._earlier += self._client.messages
        self._last = max([self._last, *(received.id for received in self._client.received)])
        self._client = self._stack.client(["reload"], self._last, listening=False)


@contextlib.contextmanager
def _sending(stack):
    """Yield a list of what has been sent so far; sending ends with the block."""
    done, sent = threading.Event(), []

    def send():
        with contextlib.closing(stack.sender()) as sender:
            while not done.wait(0.05):
                sender.send("reload", len(sent))
                sent.append(len(sent))

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    try:
        yield sent
    finally:
        done.set()
        thread.join()


def test_reloads_lose_nothing_and_leave_nothing_behind(stock_exit_code):
    with Stack(*VARIANT, jobs=False, environment=_environment) as stack:
        browser = _Browser(stack)
        machine = Machine(stack)
        machine.settle(deadline=30)
        before = _descriptors(stack)
        with _sending(stack) as sent:
            for count in range(1, RELOADS + 1):
                mark = stack.odoo.log_mark()
                _reload(stack)
                browser.come_back()
                wait_until_confirmed(stack, mark)
                assert machine.settle(deadline=30) == bus_pid(stack)
                assert stack.odoo.health()["status"] == "pass"
                wait_until(lambda: len(browser.messages) > 100 * count, 60, "more messages", 0.1)  # noqa: B023
        wait_until(lambda: len(browser.messages) >= len(sent), 10, "the last message")
        assert browser.messages == sent
        wait_until(lambda: _descriptors(stack) <= before, 20, "as few descriptors as %d" % before, 0.2)
        assert troubles(stack) == []
        assert stack.odoo.stop(END_OF_WORKERS) == stock_exit_code
