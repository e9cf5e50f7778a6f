"""Several connections are waited for in one thread, each with its own deadline."""

import selectors
import socket
import time

import psycopg2
import pytest

from bus_alt_connection import tasks


@pytest.fixture
def running():
    running = tasks.Tasks()
    yield running
    running.close()


@pytest.fixture
def pair():
    """Two connected sockets."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def reading(ours, seconds):
    """A task: wait for something to read; return whether it came."""
    return (yield tasks.Wait(ours.fileno(), selectors.EVENT_READ, tasks.time.monotonic() + seconds))


def noting(task, results):
    try:
        results.append((yield from task))
    except psycopg2.Error as error:
        results.append(str(error))


def test_to_sleep_takes_no_descriptor():
    began = time.monotonic()
    tasks.finish(tasks.sleep(0.01))
    assert time.monotonic() - began >= 0.01


def test_run_returns_at_its_time_when_a_waker_is_readable_and_when_a_task_has_ended(running, fake, clock, pair):
    ours, theirs = pair
    results, began = [], fake.now
    running.start(noting(reading(ours, 60), results))
    running.run(fake.now + 0.2)
    assert fake.now - began == pytest.approx(0.2, abs=0.001) and len(running) == 1
    theirs.send(b"x")
    running.start(noting(tasks.sleep(60), results))
    running.run(fake.now + 30)
    assert results == [True] and len(running) == 1
    # The socket stays readable.
    running.run(fake.now + 30, ours)
    assert fake.now - began == pytest.approx(0.2, abs=0.001) and len(running) == 1


def test_an_error_ends_its_task_only(running, fake, clock, pair):
    def bug():
        yield from tasks.sleep(0.01)
        raise KeyError("a bug")

    results = []
    running.start(bug())
    running.start(noting(tasks.sleep(0.1), results))
    with pytest.raises(KeyError):
        running.run(fake.now + 5)
    running.run(fake.now + 5)
    assert results == [None] and not running


def test_without_descriptors_all_tasks_are_closed(running, pair, monkeypatch):
    class NoSelector:
        def __init__(self):
            raise OSError(24, "Too many open files")

    task = reading(pair[0], 60)
    running.start(task)
    monkeypatch.setattr(tasks.selectors, "DefaultSelector", NoSelector)
    with pytest.raises(OSError):
        running.run(time.monotonic() + 5)
    assert not running and task.gi_frame is None


def test_a_descriptor_that_was_closed_meanwhile_is_ready_at_once(pair):
    """The task finds out why."""
    wait = next(reading(pair[0], 60))
    pair[0].close()
    assert tasks.ready([wait], 60) == {wait.descriptor}


def test_the_time_for_a_whole_task_is_limited_but_not_while_nobody_runs_it(fake, clock, running, pair):
    """As while the supervisor waits for its own check."""

    def answering():
        yield from reading(pair[0], 60)
        yield from reading(pair[0], 60)

    with pytest.raises(psycopg2.OperationalError, match=r"no answer in 0\.2 s"):
        tasks.finish(tasks.within(0.2, answering(), lambda: fake.now))
    tasks.finish(tasks.within(2, tasks.sleep(1.5), lambda: fake.now))
    results = []
    running.start(noting(tasks.within(0.5, answering(), running.attended), results))
    # Numbers that leave nothing to round.
    running.run(fake.now + 0.125)
    fake.now += 0.625
    running.run(fake.now + 0.125)
    assert not results
    running.run(fake.now + 5)
    assert results == ["no answer in 0.5 s"]
