"""Processes, their descriptors, Unix sockets and selectors, as the addon sees them on Linux."""

import collections
import errno
import selectors as real_selectors
import socket as real_socket
import struct

from greenlet import GreenletExit

from . import kernel
from .kernel import point

# Bytes that a socket takes until its peer reads, and what each message costs besides its length.
_ROOM, _OVERHEAD = 425984, 768
_UID = 1000


class Process:
    """A process of machine number ``machine``. Threads of a ``preempts`` process are real ones, others gevent's."""

    def __init__(self, name, preempts=True, machine=0):
        self.pid = 100 + kernel.K.number("process")
        self.name, self.preempts, self.machine = name, preempts, machine
        self.tasks, self.parked, self.descriptors = [], [], {}
        self.dead = self.stopped = False
        #: what this process has run out of
        self.no_descriptors = self.no_threads = False
        #: when it began, or went on after it had stood still
        self.resumed = kernel.K.now
        kernel.K.processes.append(self)

    def open(self, description):
        """Return the number of a new descriptor of ``description``."""
        if self.no_descriptors:
            raise OSError(errno.EMFILE, "Too many open files")
        number = next(number for number in range(3, 100000) if number not in self.descriptors)
        self.descriptors[number] = description
        description.references += 1
        return number

    def close(self, number):
        description = self.descriptors.pop(number, None)
        if description is not None:
            description.references -= 1
            if not description.references:
                description.closed()

    def stop(self):
        """Stand still, with all threads: SIGSTOP, or a call of C code that keeps the interpreter."""
        self.stopped = True
        kernel.K.note("%s stands still" % self.name)

    def go_on(self):
        if self.dead or not self.stopped:
            return
        self.stopped, self.resumed = False, kernel.K.now
        kernel.K.note("%s goes on" % self.name)
        parked, self.parked = self.parked, []
        for task in parked:
            task.queued = False
            kernel.K.ready(task)

    def kill(self):
        if self.dead:
            return
        kernel.K.note("%s is killed" % self.name)
        # "finally" blocks run, but do no harm: whatever has an effect outside refuses a dead process.
        self.dead = True
        for task in list(self.tasks):
            task.over, kernel.K.current = True, task
            task.greenlet.throw(GreenletExit)
        kernel.K.current = None
        self.tasks, self.parked = [], []
        for number in list(self.descriptors):
            self.close(number)
        kernel.K.processes.remove(self)

    def fork(self):
        """Return a child that has copies of all descriptors, and does nothing with them."""
        child = Process("%s-fork" % self.name, machine=self.machine)
        for number, description in self.descriptors.items():
            child.descriptors[number] = description
            description.references += 1
        return child


def this_process():
    """Return the process of the current task, which must be alive."""
    process = kernel.K.current.process
    if process.dead:
        raise GreenletExit
    return process


class Description:
    """What a descriptor refers to; several may refer to one, in several processes."""

    def __init__(self):
        self.references, self.waiters = 0, []

    def readable(self):
        """Return whether there is something to read; a selector, which others wait for only by mistake, has nothing."""
        return False

    def closed(self):
        """Called when the last descriptor is closed."""


class _SocketEnd(Description):
    """One end of a Unix socket, or a listening one, which has a ``queue`` of ends to accept."""

    def __init__(self, stream):
        super().__init__()
        self.stream = stream
        self.peer, self.peer_pid = None, None
        self.inbox, self.size = collections.deque(), 0
        self.shut, self.error = False, None
        self.name, self.queue, self.backlog = None, None, 0

    def readable(self):
        return bool(self.inbox or self.queue or self.shut or self.error)

    def closed(self):
        if self.name and kernel.K.socket_names.get(self.name) is self:
            del kernel.K.socket_names[self.name]
        for waiting in self.queue or ():
            if waiting.peer:
                waiting.peer.hang_up(errno.ECONNRESET)
        self.queue, self.shut = None, True
        if self.peer:
            self.peer.hang_up(errno.ECONNRESET if self.inbox else None)

    def hang_up(self, error):
        self.shut, self.error = True, self.error or error
        kernel.K.wake(self.waiters)


class Socket:
    """A Unix socket, SOCK_STREAM or SOCK_SEQPACKET."""

    def __init__(self, family=None, kind=None, _proto=0, _fileno=None, end=None):
        self._process, self._number = this_process(), -1
        self._end = end or _SocketEnd(stream=kind == real_socket.SOCK_STREAM)
        self._number = self._process.open(self._end)
        self._timeout = None
        self._hash = kernel.K.number("hash")

    # By default it is the address in memory, which no seed determines.
    def __hash__(self):
        return self._hash

    def __eq__(self, other):
        return self is other

    def fileno(self):
        return self._number

    def close(self):
        if self._number >= 0:
            number, self._number = self._number, -1
            self._process.close(number)

    __del__ = close

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self.close()

    def settimeout(self, seconds):
        self._timeout = seconds

    def setblocking(self, flag):
        self._timeout = None if flag else 0

    def setsockopt(self, *_option):
        self._use()

    def getsockopt(self, _level, option, _size):
        end = self._use()
        assert option == real_socket.SO_PEERCRED
        return struct.pack("iII", end.peer_pid, _UID, _UID)

    def bind(self, name):
        end, key = self._use(), (self._process.machine, name)
        if key in kernel.K.socket_names:
            raise OSError(errno.EADDRINUSE, "Address already in use")
        kernel.K.socket_names[key], end.name = end, key

    def listen(self, backlog=128):
        end = self._use()
        end.backlog, end.queue, end.peer_pid = backlog, collections.deque(), self._process.pid

    def connect(self, name):
        end, listening = self._use(), kernel.K.socket_names.get((self._process.machine, name))
        if listening is None or listening.shut or listening.queue is None:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        if len(listening.queue) > listening.backlog:
            # Python makes a socket with a timeout non-blocking, and Linux knows no "in progress" here.
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        theirs = _SocketEnd(stream=end.stream)
        end.peer, theirs.peer = theirs, end
        end.peer_pid, theirs.peer_pid = listening.peer_pid, self._process.pid
        listening.queue.append(theirs)
        kernel.K.wake(listening.waiters)

    def accept(self):
        end = self._use()
        self._until(lambda: end.queue or end.shut, end.waiters)
        if not end.queue:
            raise OSError(errno.EINVAL, "Invalid argument")
        if self._process.no_descriptors:
            raise OSError(errno.EMFILE, "Too many open files")
        accepted = Socket(end=end.queue.popleft())
        kernel.K.wake(end.waiters)
        return accepted, ""

    def send(self, data, _flags=0):
        end = self._use()
        peer = end.peer
        if peer is None or end.shut or peer.shut:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        cost = len(data) + _OVERHEAD
        if cost > _ROOM:
            raise OSError(errno.EMSGSIZE, "Message too long")
        self._until(lambda: peer.size + cost <= _ROOM or peer.shut, peer.waiters)
        if peer.shut:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        peer.inbox.append(bytes(data))
        peer.size += cost
        kernel.K.wake(peer.waiters)
        return len(data)

    def recv(self, size, _flags=0):
        end = self._use()
        self._until(end.readable, end.waiters)
        if end.error:
            error, end.error = end.error, None
            raise ConnectionResetError(error, "Connection reset by peer")
        if not end.inbox:
            return b""
        data = end.inbox.popleft()
        end.size -= len(data) + _OVERHEAD
        while end.stream and end.inbox:
            more = end.inbox.popleft()
            end.size -= len(more) + _OVERHEAD
            data += more
        assert len(data) <= size or not end.stream, "the simulation has streams read to their end"
        # Who waits for room to send sleeps in the same queue.
        kernel.K.wake(end.waiters)
        if end.peer:
            kernel.K.wake(end.peer.waiters)
        return data[:size]

    def shutdown(self, _how):
        end = self._use()
        end.shut = True
        kernel.K.wake(end.waiters)
        if end.peer:
            end.peer.hang_up(None)

    def _use(self):
        if kernel.K.current is not None:
            point()
        if self._process.dead:
            raise GreenletExit
        if self._number < 0:
            raise OSError(errno.EBADF, "Bad file descriptor")
        return self._end

    def _until(self, ready, waiters):
        deadline = None if self._timeout is None else kernel.K.now + self._timeout
        while not ready():
            if self._timeout == 0:
                raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
            if deadline is not None and kernel.K.now >= deadline:
                raise real_socket.timeout("timed out")
            kernel.K.wait([waiters], deadline)


def socketpair(_family=None, _kind=None):
    one, other = _SocketEnd(stream=True), _SocketEnd(stream=True)
    one.peer, other.peer = other, one
    return Socket(end=one), Socket(end=other)


class Selector:
    """Like epoll: it has a descriptor of its own, and silently forgets what was closed."""

    def __init__(self):
        self._process = this_process()
        #: number -> (key, description)
        self._keys = {}
        self._number = self._process.open(Description())

    def fileno(self):
        return self._number

    def register(self, fileobj, events, data=None):
        assert events == real_selectors.EVENT_READ, "the simulation has nobody wait until a descriptor is writable"
        number = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        description = self._process.descriptors.get(number)
        if description is None:
            raise ValueError("Invalid file descriptor: %d" % number)
        if number == self._number:
            raise OSError(errno.EINVAL, "Invalid argument")
        if number in self._keys and self._keys[number][1] is description:
            raise KeyError("%r is already registered" % fileobj)
        key = real_selectors.SelectorKey(fileobj, number, events, data)
        self._keys[number] = key, description
        return key

    def unregister(self, fileobj):
        (number,) = [number for number, (key, _description) in self._keys.items() if key.fileobj is fileobj]
        del self._keys[number]

    def select(self, timeout=None):
        point()
        deadline = None if timeout is None else kernel.K.now + max(timeout, 0)
        while True:
            open_ = [(key, description) for key, description in self._keys.values() if description.references]
            found = [(key, key.events) for key, description in open_ if description.readable()]
            if found or deadline is not None and kernel.K.now >= deadline:
                kernel.K.rng.shuffle(found)
                if not kernel.K.current.process.preempts and kernel.K.rng.random() < 0.1:
                    # gevent's select gives way to the other greenlets.
                    kernel.K.yield_()
                return found
            kernel.K.wait([description.waiters for _key, description in open_], deadline)

    def close(self):
        self._process.close(self._number)
        self._number = -1
        self._keys = {}

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self.close()
