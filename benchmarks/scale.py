"""From 10 to 1,000 websockets on one gevent process."""

import contextlib
import time

from stack.waiting import wait_until

from .burst import _wake
from .contenders import new_stack, running
from .crowd import EVERYBODY, Crowd
from .figures import milliseconds, spread

HOW = """\
Odoo 19.0, prefork, all websockets on its one gevent process (db_maxconn_gevent as by default, 64). "one": a message to
one of the clients; "all": one message to all of them, and of each the receipt by every single client, and by the last
of them. From the return of the COMMIT with the NOTIFY to the receipt. "catch-up", of this addon: the backend that
listens is told to terminate, one message to all is sent at once; seconds until the last of the clients has it. What was
not delivered within 60 s counts as missing."""


def run(quick, tell):
    keys = ("a", "e") if quick else ("a", "c", "e")
    stacks = {key: new_stack(key, "19.0", workers=1, statements=True) for key in keys}
    with running(stacks):
        for count in (10,) if quick else (10, 100, 500, 1000):
            figures = {}
            for key in keys:
                tell("%d websockets: %s" % (count, key))
                try:
                    with contextlib.closing(Crowd(stacks[key], count)) as crowd:
                        figures[key] = _measure(stacks[key], crowd, key == "e", quick)
                except (RuntimeError, TimeoutError) as error:
                    figures[key] = {"failed": str(error).split("\n")[0]}
            yield "%d websockets" % count, figures


def _measure(stack, crowd, catch_up, quick):
    _wake(stack, crowd)
    one, everyone, last, missing = [], [], [], 0
    for number in range(10 if quick else 30):
        sent = stack.send("one-%d" % (number * 7 % crowd.connected), number)
        times = crowd.receive(1, 60).get(number)
        if times:
            one.append(times[0] - sent.committed)
        else:
            missing += 1
    for number in range(2 if quick else 3):
        sent = stack.send(EVERYBODY, number)
        times = crowd.receive(crowd.connected, 60).get(number, [])
        everyone += [at - sent.committed for at in times]
        last += [max(times) - sent.committed] if times else []
        missing += crowd.connected - len(times)
    figures = {
        "connected": crowd.connected,
        "connected_seconds": round(crowd.seconds, 1),
        "one": milliseconds(one),
        "one_runs": len(one),
        "all": milliseconds(everyone),
        "all_last_seconds": spread(last),
        "missing": missing,
    }
    if catch_up:
        seconds = []
        for number in range(1 if quick else 3):
            seconds.append(_catch_up(stack, crowd, number))
        figures["catch_up_seconds"] = spread([one for one in seconds if one is not None])
        figures["catch_up_missing"] = seconds.count(None)
    return {**figures, "problems": crowd.problems}


def _catch_up(stack, crowd, number):
    """Return the seconds from a kill of the listener until all have what was sent right after it; None: never."""
    backend = stack.wait_for_listen()
    stack.server.execute("SELECT pg_terminate_backend(%s)", (backend,))
    killed = time.monotonic()
    wait_until(lambda: backend not in {row.pid for row in stack.server.activity()}, 5, "the backend to go", 0.001)
    stack.send(EVERYBODY, "missed %d" % number)
    times = crowd.receive(crowd.connected, 60).get("missed %d" % number, [])
    return max(times) - killed if len(times) >= crowd.connected else None
