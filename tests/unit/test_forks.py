"""A forked child keeps nothing open that only its parent may use."""

import contextlib
import os
import socket
import uuid

import pytest

from bus_alt_connection.forks import close_in_children

pytestmark = pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="Python 3.7 or newer is needed")


@contextlib.contextmanager
def forked():
    """Fork a child that does nothing until the block is over."""
    end, ended = os.pipe()
    began, begin = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(ended)
        os.write(begin, b"x")
        os.read(end, 1)
        os._exit(0)
    try:
        # fork() returns in the child once it has closed what it is not to keep.
        os.read(began, 1)
        yield
    finally:
        for descriptor in (end, ended, began, begin):
            os.close(descriptor)
        os.waitpid(pid, 0)


def test_the_name_of_a_socket_is_free_once_the_parent_has_closed_it():
    name = "\0" + uuid.uuid4().hex
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    close_in_children(server)
    server.bind(name)
    server.listen(1)
    with forked():
        server.close()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as another:
            another.bind(name)


def test_the_other_end_notices_that_the_parent_has_closed_its_end():
    ours, theirs = socket.socketpair()
    close_in_children(ours)
    with forked(), theirs:
        ours.close()
        theirs.settimeout(5)
        assert theirs.recv(1) == b""


def test_the_parent_goes_on_with_what_its_child_has_closed():
    ours, theirs = socket.socketpair()
    close_in_children(ours)
    with forked(), ours, theirs:
        ours.send(b"x")
        theirs.settimeout(5)
        assert theirs.recv(1) == b"x"
