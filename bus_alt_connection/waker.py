# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""Wake up a thread or greenlet that waits in ``select``."""

import contextlib
import socket
import threading


class Waker(object):
    """A descriptor that becomes readable when `wake` is called.

    All methods may be called by any thread. None of them waits for another thread longer than a non-blocking ``send``
    takes. `wake` and `close` may also be called by a finalizer that the garbage collector runs while the same thread is
    inside another method of this object.
    """

    def __init__(self):
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._wake_requested = False
        self._close_requested = False
        self._closed = False
        # If one thread closes a socket while another is inside ``send``, the next file that is opened may get the
        # socket's number, and the byte would go there. So any code that sends, receives or closes holds this lock.
        self._lock = threading.Lock()

    def fileno(self):
        """Return the descriptor to select on, or -1 after `close`."""
        return self._reader.fileno()

    def wake(self):
        """Make the descriptor readable. Does nothing after `close`."""
        self._wake_requested = True
        self._serve_requests()

    def clear(self):
        """Drain the descriptor, so that normally it is not readable until the next `wake`.

        Call this first, then look for work. A finalizer must not call it.
        """
        with self._lock:
            if not self._closed:
                with contextlib.suppress(BlockingIOError):
                    self._reader.recv(4096)
        self._serve_requests()

    def close(self):
        """Close the descriptor. If another call is using it, that call closes it before it returns."""
        self._close_requested = True
        self._serve_requests()

    def _serve_requests(self):
        # Never wait for the lock here: its holder may be this very thread, further up the stack. Whoever holds the
        # lock looks at the requests again after releasing it, so none is forgotten.
        while self._has_request() and self._lock.acquire(False):
            try:
                self._serve_one()
            finally:
                self._lock.release()

    def _has_request(self):
        return not self._closed and (self._wake_requested or self._close_requested)

    def _serve_one(self):
        if self._closed:
            return
        if self._close_requested:
            self._closed = True
            self._reader.close()
            self._writer.close()
        elif self._wake_requested:
            self._wake_requested = False
            # A full buffer is readable already.
            with contextlib.suppress(BlockingIOError):
                self._writer.send(b"\0")
