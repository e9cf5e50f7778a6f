"""A forked child keeps nothing open that only its parent may use, and says nothing for it."""

import os
import socket
import types
import uuid

import pytest

from bus_alt_connection import forks, sharing

pytestmark = pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="Python 3.7 or newer is needed")


class Resource:
    """What can be given to `forks.close_in_children`."""

    def __init__(self, fileno, close):
        self.fileno, self.close = fileno, close


@pytest.fixture
def fork():
    """Return a function that forks a child, which does nothing until the end of the test."""
    end, ended = os.pipe()

    def fork():
        # fork() returns in the child once that has closed what it is not to keep.
        began, begin = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(ended)
            os.write(begin, b"x")
            os.read(end, 1)
            os._exit(0)
        children.append(pid)
        os.read(began, 1)
        os.close(began)
        os.close(begin)

    children = []
    yield fork
    os.close(ended)
    os.close(end)
    for pid in children:
        os.waitpid(pid, 0)


def test_the_other_end_hears_from_the_parent_only_and_notices_that_it_has_closed(fork):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        resource = Resource(ours.fileno, lambda: ours.send(b"good-bye"))
        forks.close_in_children(resource)
        fork()
        theirs.settimeout(5)
        ours.send(b"x")
        assert theirs.recv(100) == b"x"
        ours.close()
        assert theirs.recv(100) == b""


def test_a_child_does_not_keep_the_name_of_a_leader():
    listener = types.SimpleNamespace(database="postgres")
    leader = sharing.Leader(listener, "\0" + uuid.uuid4().hex, 0)
    assert leader._server in forks._of_parent
    leader.close()
