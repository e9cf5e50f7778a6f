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


class Writer:
    """A socket that calls ``during()`` while it sends."""

    def __init__(self, writer, during):
        self._writer, self._during = writer, during
        self.sending, self.calls = False, []

    def send(self, data):
        self.calls.append("send")
        self.sending = True
        during, self._during = self._during, lambda: None
        during()
        self.sending = False
        return self._writer.send(data)

    def close(self):
        assert not self.sending
        self.calls.append("close")
        self._writer.close()


def meddle(waker, during):
    waker._writer = Writer(waker._writer, during)
    return waker._writer


def test_it_is_readable_from_wake_to_clear(waker):
    assert not is_readable(waker)
    waker.wake()
    waker.wake()
    assert is_readable(waker)
    waker.clear()
    assert not is_readable(waker)
    waker.clear()


def test_it_wakes_a_thread_that_selects(waker):
    selecting = threading.Thread(target=select.select, args=[[waker], [], [], 30])
    selecting.start()
    waker.wake()
    selecting.join(5)
    assert not selecting.is_alive()


def test_any_number_of_wakes_never_blocks(waker):
    for _ in range(10000):
        waker.wake()
    waker.clear()
    assert not is_readable(waker)


def test_a_wake_after_clear_is_seen_even_if_the_buffer_was_full(waker):
    for _ in range(1000):
        waker.wake()
    waker.clear()
    waker.wake()
    assert is_readable(waker)


def test_nothing_happens_after_close(waker):
    waker.close()
    waker.close()
    waker.wake()
    waker.clear()
    assert waker.fileno() == -1


def test_close_waits_for_a_send_of_another_thread(waker):
    inside, go_on = threading.Event(), threading.Event()

    def block():
        inside.set()
        assert go_on.wait(10)

    writer = meddle(waker, block)
    waking = threading.Thread(target=waker.wake)
    waking.start()
    assert inside.wait(10)
    waker.close()
    assert writer.calls == ["send"]
    go_on.set()
    waking.join(10)
    assert writer.calls == ["send", "close"]
    assert waker.fileno() == -1


def test_a_wake_during_the_send_of_another_thread_is_not_lost(waker):
    inside, go_on = threading.Event(), threading.Event()

    def block():
        inside.set()
        assert go_on.wait(10)

    meddle(waker, block)
    waking = threading.Thread(target=waker.wake)
    waking.start()
    assert inside.wait(10)
    waker.wake()
    go_on.set()
    waking.join(10)
    assert len(waker._reader.recv(10)) == 2


def test_a_finalizer_may_wake_inside_wake(waker):
    """As when the garbage collector runs there."""
    writer = meddle(waker, waker.wake)
    waker.wake()
    assert writer.calls == ["send", "send"]
    assert is_readable(waker)


def test_a_finalizer_may_close_inside_wake(waker):
    writer = meddle(waker, waker.close)
    waker.wake()
    assert writer.calls == ["send", "close"]


def test_a_finalizer_may_wake_inside_clear(waker):
    class Reader:
        fileno = waker._reader.fileno
        close = waker._reader.close
        recv_now = waker._reader.recv

        def recv(self, size):
            received = self.recv_now(size)
            waker.wake()
            return received

    waker._reader = Reader()
    waker.wake()
    waker.clear()
    assert is_readable(waker)
