"""A forked child keeps nothing open that only its parent may use."""

import os
import socket
import uuid

import pytest

from bus_alt_connection.forks import close_in_children

pytestmark = pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="Python 3.7 or newer is needed")


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


def test_the_name_of_a_socket_is_free_once_the_parent_has_closed_it(fork):
    name = "\0" + uuid.uuid4().hex
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        close_in_children(server)
        server.bind(name)
        server.listen(1)
        fork()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as another:
        another.bind(name)


def test_the_other_end_hears_from_the_parent_only_and_notices_that_it_has_closed(fork):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        close_in_children(ours)
        fork()
        theirs.settimeout(5)
        ours.send(b"x")
        assert theirs.recv(1) == b"x"
        ours.close()
        assert theirs.recv(1) == b""
