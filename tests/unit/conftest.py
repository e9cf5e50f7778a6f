import gc
import logging
import select
import selectors
import sys
import threading
import types
import uuid

import pytest

from bus_alt_connection import catchup, log, settings, tasks
from bus_alt_connection import listener as listener_module
from bus_alt_connection import supervisor as supervisor_module
from bus_alt_connection.listener import Listener
from bus_alt_connection.log import CONFIRMED
from bus_alt_connection.supervisor import LISTENING
from tests.unit.fakes import Cursor as FakeCursor
from tests.unit.fakes import Events, FakeFeed, FakePool, FakeServer, Watched, WatchedSelector, connected


@pytest.fixture
def fake(monkeypatch):
    """A server without a process; it sees whether the listeners in front of it have something to do."""
    watched = types.SimpleNamespace(DefaultSelector=WatchedSelector, EVENT_READ=selectors.EVENT_READ)
    monkeypatch.setattr(listener_module, "selectors", watched)
    return FakeServer()


@pytest.fixture
def events():
    return Events()


@pytest.fixture
def logged(caplog, monkeypatch):
    """Return a function that gives the lines of the addon's log so far: those with all of the texts."""
    caplog.set_level(logging.DEBUG, "bus_alt_connection")
    monkeypatch.setattr(log, "_last", {})

    def lines(*texts):
        messages = [record.getMessage() for record in caplog.records]
        return [message for message in messages if all(text in message for text in texts)]

    return lines


@pytest.fixture
def listen(fake, events):
    """Return a function that starts a listener for the feeds; it is ended after the test."""
    started = []

    def listen(*feeds, connect=fake.connect, journal=events, **more):
        listener = Listener("postgres", connect, lambda: False, journal, 19, **more)
        for feed in feeds:
            listener.add(feed)
        # Weakly held there.
        started.append((listener, feeds))
        fake.listeners.append(listener)
        threading.Thread(target=listener.run, name="bus_alt_connection.listener", daemon=True).start()
        return listener

    yield listen
    _end(listener for listener, _feeds in started)


@pytest.fixture
def options():
    return settings.read({}, {})


@pytest.fixture
def watch(fake, events, listen, options, clock):
    """Return a function that starts a listener of feeds; it returns the `Watched` once that is connected."""

    def watch(*feeds, connects=True, **more):
        feeds = feeds or [FakeFeed("imbus")]
        watched = Watched(fake, listen(*feeds), events, feeds, options, **more)
        if connects:
            connected(watched.listener)
        return watched

    return watch


@pytest.fixture
def settled(watch):
    """Return a function that does as ``watch`` does, and returns once the listener has heard itself for a while."""

    def settled(*feeds, **more):
        watched = watch(*feeds, **more)
        watched.live(300, step=20)
        assert watched.mode == LISTENING
        watched.feed.all()
        watched.events.expect(CONFIRMED)
        return watched

    return settled


@pytest.fixture
def watched(settled):
    return settled()


@pytest.fixture
def clock(fake, monkeypatch):
    """Time is ``fake.now`` for all that the supervisor does.

    It goes on while tasks wait, but not before the threads of the listeners have done what there is to do.
    """
    for module in (listener_module, supervisor_module, catchup, tasks):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: fake.now))
    # A listener pauses in real time.
    monkeypatch.setattr(listener_module, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(listener_module, "LONGEST_DELAY", 0.02)

    def ready(waits, timeout):
        fake.settle()
        readable, _writable, _failed = select.select([w.descriptor for w in waits if w.descriptor], [], [], 0)
        if not readable:
            # At least a moment: rounding may leave what is due a little in the future, without a time to wait for it.
            fake.now += max(timeout, 1e-6)
        return set(readable)

    monkeypatch.setattr(tasks, "ready", ready)


@pytest.fixture
def odoo(monkeypatch):
    """Put a stub of Odoo into ``sys.modules``; return it, with ``patch``, the addon's, not yet installed.

    ``odoo.pool``, a :class:`FakePool`, has the connections of ordinary cursors: none, unless a test gives it some.
    """
    stub = types.ModuleType("odoo")

    class Cursor(FakeCursor):
        @staticmethod
        def frame_codeinfo(frame, back=0):
            return stub.sql_db.frame_codeinfo(frame, back)

    def frame_codeinfo(frame, back=0):
        for _ in range(back):
            frame = frame.f_back
        return frame.f_code.co_filename, frame.f_lineno

    class Connection:
        def __init__(self, pool, dbname, dsn):
            self.__pool = pool
            self.dbname, self.dsn = dbname, dsn

        def cursor(self):
            return Cursor(self.__pool, self.dbname, self.dsn)

    class Config(dict):
        options = property(lambda self: self)

    def no_connection(database):
        raise AssertionError("a pooled connection to %s" % database)

    def connection_info_for(db_or_uri, readonly=False):
        if "://" in db_or_uri:
            return db_or_uri.rpartition("/")[2], {"dsn": db_or_uri}
        return db_or_uri, dict(own, database=db_or_uri, host="replica" if readonly else own["host"])

    own = {"host": "127.0.0.1", "port": 1, "user": "odoo", "password": "s3cret", "sslmode": "prefer"}
    # Tests that run beside this one must not share with it.
    own["fallback_application_name"] = uuid.uuid4().hex
    modules = {
        "sql_db": {
            "Connection": Connection,
            "Cursor": Cursor,
            "frame_codeinfo": frame_codeinfo,
            "connection_info_for": connection_info_for,
            # It looks the other up when it is called, as Odoo's does.
            "db_connect": lambda to, *more: Connection(stub.pool, *stub.sql_db.connection_info_for(to, *more)),
        },
        "tools": {"config": Config()},
        "http": {
            "Controller": object,
            "route": lambda *_args, **_kwargs: lambda function: function,
            "Response": lambda body, status, headers, **_more: types.SimpleNamespace(body=body, status=status),
        },
        "release": {"version_info": (19, 0, 0, "final", 0, "")},
        "service": {},
        "service.server": {"server": types.SimpleNamespace(quit_signals_received=0)},
    }
    monkeypatch.setitem(sys.modules, "odoo", stub)
    for name, content in modules.items():
        module = types.ModuleType("odoo." + name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        setattr(stub, name.replace(".", "_"), module)
    stub.pool, stub.own = FakePool(no_connection), own
    from bus_alt_connection import patch

    stub.patch = patch
    yield stub
    _end(supervisor.listener for supervisor in patch._here().supervisors.values())
    for name in ("patch", "health"):
        sys.modules.pop("bus_alt_connection." + name, None)
        vars(sys.modules["bus_alt_connection"]).pop(name, None)


def _end(listeners):
    """End ``listeners`` and all threads of the addon."""
    listeners = list(listeners)
    for listener in listeners:
        listener.close()
    for thread in threading.enumerate():
        if thread.name.startswith("bus_alt_connection."):
            thread.join(5)
            assert not thread.is_alive()
    # The garbage collector would, and complain.
    for listener in listeners:
        listener._waker.close()
        listener.supervisor_waker.close()
    gc.collect()
