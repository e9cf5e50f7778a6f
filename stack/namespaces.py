"""Networks of their own, in which packets can really get lost. Needs root, and Linux."""

import contextlib
import ctypes
import os
import socket
import subprocess

from . import guard
from .commands import run
from .system import ensure_packages

_CLONE_NEWNET = 0x40000000
# Addresses that are set aside for documentation, and those of the network cards.
_CARDS = {"192.0.2.1": "02:00:00:00:00:01", "192.0.2.2": "02:00:00:00:00:02"}


class Unavailable(Exception):
    """This machine, or we on it, can not make network namespaces; the message says why."""


class Network:
    """Two namespaces, ``near`` and ``far``, with a cable between them; a context manager.

    Nothing of it is seen in the network of the machine. It goes when it is left, or when this process ends.

    :raise Unavailable: on entry
    """

    near_host, far_host = _CARDS

    def __enter__(self):
        if os.geteuid() != 0:
            raise Unavailable("only root may make network namespaces")
        with contextlib.ExitStack() as exits:
            try:
                ensure_packages("iproute2", "util-linux")
                self._near = exits.enter_context(_namespace())
                self._far = exits.enter_context(_namespace())
                self._lay_cable()
            except RuntimeError as error:
                raise Unavailable(str(error)) from error
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *_exception):
        self._exits.close()

    def near(self):
        """While in this context, what this thread begins (sockets, threads, processes) is in the near namespace."""
        return _inside(self._near)

    def far(self):
        """While in this context, what this thread begins is in the far namespace."""
        return _inside(self._far)

    def listening(self):
        """Return a socket that listens at ``far_host``."""
        with _inside(self._far):
            return socket.create_server((self.far_host, 0))

    def unplug(self):
        """From now on all packets between the two get lost."""
        # At the far end: the near one would tell the programs there that it has no way.
        _ip(self._far, "link", "set", "cable", "down")

    def _lay_cable(self):
        _ip(self._near, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", self._far)
        for namespace, host in ((self._near, self.near_host), (self._far, self.far_host)):
            _ip(namespace, "address", "add", host + "/24", "dev", "cable")
            _ip(namespace, "link", "set", "lo", "up")
            _ip(namespace, "link", "set", "cable", "address", _CARDS[host], "up")
        # Otherwise the near end would ask who has the address, and take silence for an answer.
        neighbour = (self.far_host, "lladdr", _CARDS[self.far_host])
        _ip(self._near, "neighbour", "replace", *neighbour, "nud", "permanent", "dev", "cable")


@contextlib.contextmanager
def _namespace():
    """A network namespace, for as long as a process is in it; yields the id of that process."""
    command = ["unshare", "--net", "sh", "-c", "echo; exec sleep infinity"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True) as process:
        guard.watch(process.pid)
        try:
            printed = process.stdout.readline().strip()
            if printed or process.poll() is not None:
                raise RuntimeError("can't make a network namespace: %s" % printed.decode())
            yield str(process.pid)
        finally:
            process.kill()
            process.wait()
            guard.forget(process.pid)


def _ip(namespace, *arguments):
    run(["nsenter", "--net", "--target", namespace, "ip", *arguments])


@contextlib.contextmanager
def _inside(namespace):
    with open("/proc/thread-self/ns/net") as ours, open("/proc/%s/ns/net" % namespace) as theirs:
        _enter(theirs)
        try:
            yield
        finally:
            _enter(ours)


def _enter(namespace):
    # os.setns came with Python 3.12 only.
    if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "can't enter a network namespace")
