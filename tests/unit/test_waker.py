"""A waker wakes a selecting thread, whatever else happens at the same moment, and never writes to a foreign file."""

import select
import threading

import pytest

from bus_alt_connection.waker import Waker


@pytest.fixture
def waker():
    waker = Waker()
    yield waker
    waker.close()


def is_readable(waker):
    return bool(select.select([waker], [], [], 0)[0])


class Watched:
    """A socket that calls ``during()`` once while it sends or receives, and notes what it was called for."""

    def __init__(self, inner, during):
        self._inner, self._during, self.calls = inner, during, []
        self.fileno = inner.fileno

    def send(self, data):
        return self._call("send", data)

    def recv(self, size):
        return self._call("recv", size)

    def close(self):
        self.calls.append("close")
        self._inner.close()

    def _call(self, method, argument):
        self.calls.append(method)
        result = getattr(self._inner, method)(argument)
        during, self._during = self._during, lambda: None
        during()
        self.calls.append("end")
        return result


def test_it_is_readable_from_wake_to_clear(waker):
    assert not is_readable(waker)
    selecting = threading.Thread(target=select.select, args=[[waker], [], [], 30])
    selecting.start()
    waker.wake()
    selecting.join(5)
    assert not selecting.is_alive()
    waker.wake()
    waker.clear()
    assert not is_readable(waker)
    waker.clear()


def test_any_number_of_wakes_blocks_nobody_and_one_after_clear_is_seen(waker):
    for _ in range(10000):
        waker.wake()
    waker.clear()
    assert not is_readable(waker)
    waker.wake()
    assert is_readable(waker)


def test_nothing_happens_after_close(waker):
    waker.close()
    waker.close()
    waker.wake()
    waker.clear()
    assert waker.fileno() == -1


@pytest.mark.parametrize("method", ["wake", "close"])
def test_another_thread_or_a_finalizer_may_wake_or_close_inside_wake(waker, method):
    """Neither waits for the lock, and the call that holds it does what was requested meanwhile."""
    waker._writer = Watched(waker._writer, getattr(waker, method))
    waker.wake()
    assert waker._writer.calls == ["send", "end"] + (["send", "end"] if method == "wake" else ["close"])


def test_a_finalizer_may_wake_inside_clear(waker):
    waker._reader = Watched(waker._reader, waker.wake)
    waker.wake()
    waker.clear()
    assert is_readable(waker)
