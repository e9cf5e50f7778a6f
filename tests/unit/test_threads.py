"""The addon's threads take little address space, and are threads like any other."""

import ctypes
import os
import subprocess
import sys
import textwrap
import threading
import types

from bus_alt_connection import threads
from stack.stack import ADDON


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
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=ADDON, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


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


def test_a_forked_child_does_not_wait_for_a_lock_of_its_parent(monkeypatch):
    with threads._locks.setdefault(os.getpid(), threading.Lock()):
        monkeypatch.setattr(threads, "os", types.SimpleNamespace(getpid=lambda: -1))
        threads.start(lambda: None, "ours").join(5)
