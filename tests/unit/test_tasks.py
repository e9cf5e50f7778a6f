"""Several connections are waited for in one thread, each with its own deadline."""

import contextlib
import socket
import time

import psycopg2
import pytest

from bus_alt_connection import connection, tasks


@pytest.fixture
def silent():
    """libpq's keywords of a server that takes connections and says nothing, and a list of what it took."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)
        own = {
            "host": "127.0.0.1",
            "port": server.getsockname()[1],
            "dbname": "x",
            "user": "odoo",
            "sslmode": "disable",
        }
        yield own, lambda: server.accept()[0]


def noting(task, results):
    try:
        results.append((yield from task))
    except psycopg2.Error as error:
        results.append(str(error))


def test_deadlines_run_at_the_same_time(silent, monkeypatch):
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT", 0.3)
    own, _accept = silent
    running, results, began = tasks.Tasks(), [], time.monotonic()
    for _ in range(5):
        running.start(noting(connection.opening(own), results))
    assert len(running) == 5
    while running:
        running.run(began + 60)
    assert time.monotonic() - began < 1.4
    assert len(results) == 5 and all(text.endswith("no answer in 0.3 s") for text in results)


def test_it_returns_when_it_is_told_to(silent):
    own, _accept = silent
    running, began = tasks.Tasks(), time.monotonic()
    running.start(connection.opening(own))
    running.run(began + 0.2)
    assert 0.19 < time.monotonic() - began < 2 and len(running) == 1
    running.close()


def test_what_is_closed_while_it_waits_hangs_up(silent):
    own, accept = silent
    running = tasks.Tasks()
    running.start(connection.opening(own))
    running.run(time.monotonic() + 0.1)
    with contextlib.closing(accept()) as client:
        client.settimeout(5)
        running.close()
        while client.recv(4096):
            pass
    assert not running


def test_an_answer_that_came_while_nobody_looked_counts(silent, monkeypatch):
    """As after a job that kept the interpreter, or a process that was stopped."""
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT", 0.2)
    own, accept = silent
    running, results = tasks.Tasks(), []
    running.start(noting(connection.opening(own), results))
    running.run(time.monotonic() + 0.05)
    with contextlib.closing(accept()) as client:
        client.recv(4096)
        client.sendall(b"E\0\0\0\x20SFATAL\0VFATAL\0C28000\0Mno entry\0\0")
        time.sleep(0.3)
        while running:
            running.run(time.monotonic() + 5)
    assert "no entry" in results[0]


def test_an_error_of_one_ends_no_other(silent):
    def bug():
        yield from tasks.sleep(0.01)
        raise KeyError("a bug")

    running, results = tasks.Tasks(), []
    running.start(bug())
    running.start(noting(tasks.sleep(0.1), results))
    with pytest.raises(KeyError):
        running.run(time.monotonic() + 5)
    running.run(time.monotonic() + 5)
    assert results == [None] and not running


def test_without_descriptors_all_are_closed(silent, monkeypatch):
    class NoSelector:
        def __init__(self):
            raise OSError(24, "Too many open files")

    own, _accept = silent
    running = tasks.Tasks()
    running.start(connection.opening(own))
    monkeypatch.setattr(tasks.selectors, "DefaultSelector", NoSelector)
    with pytest.raises(OSError):
        running.run(time.monotonic() + 5)
    assert not running


def test_the_time_for_a_whole_task_is_limited(silent):
    own, _accept = silent
    began = time.monotonic()
    with pytest.raises(psycopg2.OperationalError, match=r"no answer in 0\.2 s"):
        tasks.finish(tasks.within(0.2, connection.opening(own), time.monotonic))
    assert time.monotonic() - began < 2


def test_the_time_during_which_nobody_looks_does_not_count(silent):
    """As while the supervisor waits for its own check."""
    own, accept = silent
    running, results = tasks.Tasks(), []
    running.start(noting(tasks.within(0.5, connection.opening(own), running.attended), results))
    running.run(time.monotonic() + 0.1)
    time.sleep(0.6)
    running.run(time.monotonic() + 0.1)
    assert not results
    running.run(time.monotonic() + 5)
    assert results == ["no answer in 0.5 s"]
    accept().close()
