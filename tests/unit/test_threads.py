"""The addon's threads take little address space, and are threads like any other."""

import ctypes
import subprocess
import sys
import textwrap
import threading
import types

import pytest

from bus_alt_connection import threads
from stack.stack import ADDON


def run(script):
    """Run a script in a process of its own; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ADDON, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout.strip()


def test_it_runs_in_a_daemon_thread_of_that_name_and_other_threads_keep_their_stacks():
    seen = []
    previous = threading.stack_size(1 << 23)
    try:
        thread = threads.start(lambda: seen.append(threading.current_thread()), "a name")
        thread.join(5)
        assert threading.stack_size() == 1 << 23
    finally:
        threading.stack_size(previous)
    assert seen == [thread] and (thread.name, thread.daemon) == ("a name", True)


def test_three_threads_take_a_few_megabytes():
    """Without `threads` they take 72 MB each, once they have allocated something."""
    script = """
        import re, threading
        from bus_alt_connection import threads

        def size():
            return int(re.search(r"VmSize:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

        def work():
            kept = [bytes(1000) for _ in range(1000)]
            done.release()
            end.wait()

        done, end, before = threading.Semaphore(0), threading.Event(), size()
        threads.limit_arenas()
        for number in range(3):
            threads.start(work, str(number))
            done.acquire()
        print(size() - before)
        end.set()
    """
    assert float(run(script)) < 14


def test_the_stack_is_enough_for_any_payload_an_address_and_a_deep_traceback():
    """Python 3.13 crashes with a stack of less than 1 MB where a payload has nothing but brackets."""
    script = """
        import logging, socket
        from bus_alt_connection import payload, threads

        def recurse(depth):
            return recurse(depth - 1) + 1 if depth else len(socket.getaddrinfo("localhost", 1)) and 1 / 0

        def work():
            for text in ["[" * 7999, "[" * 3999 + "]" * 3999, '{"a":' * 1599, '[{"a":' * 1300]:
                assert payload.readable(text, 20) is None
            try:
                recurse(900)
            except ZeroDivisionError:
                logging.exception("deep")
                print("done")

        threads.start(work, "working").join()
    """
    assert run(script) == "done"


def test_a_want_of_threads_is_an_error_and_other_threads_keep_their_stacks(monkeypatch):
    def no_thread(_self):
        raise RuntimeError("can't start new thread")

    before = threading.stack_size()
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    with pytest.raises(RuntimeError):
        threads.start(lambda: None, "ours")
    assert threading.stack_size() == before


def test_a_size_that_the_system_does_not_take_is_left_out(monkeypatch):
    monkeypatch.setattr(threads, "STACK_SIZE", 1)
    threads.start(lambda: None, "ours").join(5)


def test_greenlets_have_no_stacks_of_their_own(monkeypatch):
    """gevent would not take the size back."""
    monkey = types.SimpleNamespace(is_module_patched=lambda name: name == "threading")
    monkeypatch.setitem(sys.modules, "gevent.monkey", monkey)
    sizes = []
    monkeypatch.setattr(threading, "stack_size", lambda *size: sizes.append(size) or 0)
    threads.start(lambda: None, "ours").join(5)
    assert sizes == []


def test_a_libc_without_that_option_is_no_error(monkeypatch):
    def no_library(_name):
        raise OSError

    for library in (no_library, lambda _name: object()):
        monkeypatch.setattr(ctypes, "CDLL", library)
        threads.limit_arenas()
    monkeypatch.setitem(sys.modules, "ctypes", None)
    threads.limit_arenas()


def test_a_forked_child_does_not_wait_for_a_thread_of_its_parent_that_is_being_started():
    script = """
        import os, signal, threading
        from bus_alt_connection import threads

        def wait_a_moment(*size):
            starting.set()
            return go_on.wait() and stack_size(*size)

        starting, go_on, stack_size = threading.Event(), threading.Event(), threading.stack_size
        threading.stack_size = wait_a_moment
        threading.Thread(target=threads.start, args=[lambda: None, "theirs"]).start()
        starting.wait()
        threading.stack_size = stack_size
        pid = os.fork()
        if not pid:
            signal.alarm(20)
            threads.start(lambda: None, "ours").join()
            os._exit(7)
        print(os.WEXITSTATUS(os.waitpid(pid, 0)[1]))
        go_on.set()
    """
    assert run(script) == "7"
