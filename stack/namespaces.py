"""A network of its own, in which packets can really get lost. Needs root, and Linux."""

import contextlib
import ctypes
import os
import subprocess
from typing import NamedTuple

from .commands import run
from .system import ensure_packages

_CLONE_NEWNET = 0x40000000
# Addresses that are set aside for documentation, and of the network cards.
NEAR_HOST, NEAR_CARD = "192.0.2.1", "02:00:00:00:00:01"
FAR_HOST, FAR_CARD = "192.0.2.2", "02:00:00:00:00:02"


class Network(NamedTuple):
    """Two namespaces with a cable between them, each known by the id of a process in it."""

    near: str
    far: str

    def unplug(self, end):
        """From now on all packets between the two get lost; the programs at this end are told that there is no way."""
        _ip(end, "link", "set", "cable", "down")


@contextlib.contextmanager
def network():
    """A :class:`Network`, of which nothing is seen in that of the machine. It goes at the end, or with this process.

    :raise RuntimeError: this machine, or we on it, can not make network namespaces; the message says why
    """
    if os.geteuid() != 0:
        raise RuntimeError("only root may make network namespaces")
    ensure_packages("iproute2", "util-linux")
    with _namespace() as near, _namespace() as far:
        _ip(near, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", far)
        ends = (near, NEAR_HOST, NEAR_CARD), (far, FAR_HOST, FAR_CARD)
        for (namespace, host, card), (_, other_host, other_card) in (ends, ends[::-1]):
            _ip(namespace, "address", "add", host + "/24", "dev", "cable")
            _ip(namespace, "link", "set", "lo", "up")
            _ip(namespace, "link", "set", "cable", "address", card, "up")
            # Otherwise Linux would ask the other end for its hardware address, and report an error without an answer.
            _ip(namespace, "neighbour", "replace", other_host, "lladdr", other_card, "nud", "permanent", "dev", "cable")
        yield Network(near, far)


@contextlib.contextmanager
def inside(namespace):
    """While in this context, what this thread begins (sockets, threads, processes) is in the namespace."""
    with open("/proc/thread-self/ns/net") as ours, open("/proc/%s/ns/net" % namespace) as theirs:
        _enter(theirs)
        try:
            yield
        finally:
            _enter(ours)


@contextlib.contextmanager
def _namespace():
    """A network namespace, for as long as a process is in it: until its input ends, which it does with us."""
    command = ["unshare", "--net", "sh", "-c", "echo; exec cat"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        printed = process.stdout.readline().strip()
        if printed:
            raise RuntimeError("can't make a network namespace: %s" % printed.decode())
        yield str(process.pid)


def _ip(namespace, *arguments):
    run(["nsenter", "--net", "--target", namespace, "ip", *arguments])


def _enter(namespace):
    # os.setns came with Python 3.12 only.
    if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "can't enter a network namespace")
