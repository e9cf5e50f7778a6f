"""How long a push takes, from the COMMIT of the NOTIFY to the client's receipt."""

import contextlib
import random
import time

from stack.waiting import wait_until

from .contenders import new_stack, start, wait_for_push
from .figures import milliseconds, ratio

TITLE = "Push latency, Odoo 19.0 %s"
SHARING_TITLE = "Push by way of a leader, Odoo 19.0 %s"
_PATIENCE = 2.0
# Seconds for all pushes of a table. A slow machine makes fewer pushes, and the table says how many.
_LIMIT = 120.0


def run(quick, tell):
    """All contenders run at the same time, each with its own PostgreSQL, and take turns in rounds of random order: each
    gets one notification for one client, and the next contender has its turn when that has arrived. Sender and client
    are threads of one process, so they read the same clock. The milliseconds are the time from the return of the COMMIT
    with the NOTIFY to the receipt by the client. "with COMMIT" begins right before the transaction with the NOTIFY, so
    it includes up to three hops through the pooler. A message that has not arrived after 2 s is counted as late and is
    not among the n. Ratios are to contender (a); their spread is that of ten blocks of rounds.
    """
    for workers, mode in _modes(quick):
        tell(mode)
        with contextlib.ExitStack() as exits:
            keys = ("a", "c", "d", "e", "e-direct")
            stacks = start((new_stack(key, workers=workers) for key in keys), exits)
            clients = {key: _Client(stack, exits) for key, stack in zip(keys, stacks)}
            pushes, late = _take_turns(clients, 60 if quick else 1000)
        for key in keys:
            yield TITLE % mode, _row(key, pushes[key], pushes["a"], late[key])


def run_sharing(quick, tell):
    """Two PostgreSQLs with a PgBouncer each run at the same time, and two instances of Odoo on each of them. On the
    first, the instances share a direct connection, so that a process of one instance is the leader and a process of the
    other one is its follower. On the second, they have IMDISPATCHER_SHARE=0. Each of the four instances has a client
    with a channel of its own. They take turns in rounds of random order, as the contenders of the push latency do, and
    the milliseconds mean the same. "with COMMIT" is there because COMMIT wakes all backends that listen before it
    returns, and that is a single one if all processes share. Ratios are to the counterpart among the instances that do
    not share; their spread is that of ten blocks of rounds.
    """
    for workers, mode in _modes(quick):
        tell(mode)
        clients = {}
        with contextlib.ExitStack() as exits:
            keys = ("e", "e-own")
            for key, first in zip(keys, start((new_stack(key, workers=workers, jobs=False) for key in keys), exits)):
                both = [first, exits.enter_context(first.another())]
                for role, stack in zip(("leader", "follower"), both):
                    clients[key, role] = _Client(stack, exits)
                if key == "e":
                    follower = both[1].odoo
                    wait_until(lambda follower=follower: follower.health(30)["mode"] == "shared", 30, "a follower")
            pushes, late = _take_turns(clients, 60 if quick else 1000)
        for role in ("leader", "follower"):
            own = pushes["e-own", role]
            yield SHARING_TITLE % mode, _row(role, pushes["e", role], own, late["e", role])
            yield SHARING_TITLE % mode, _row("beside the " + role, own, own, late["e-own", role])


def _modes(quick):
    return [(2, "prefork")] if quick else [(2, "prefork"), (0, "threaded")]


def _take_turns(clients, count):
    """Return the pushes to each client, pairs of seconds, and how many were late."""
    pushes = {key: [] for key in clients}
    late = dict.fromkeys(clients, 0)
    end = time.monotonic() + _LIMIT
    for number in range(count):
        if time.monotonic() > end:
            break
        for key in random.sample(list(clients), len(clients)):
            try:
                pushes[key].append(clients[key].push(number))
            except TimeoutError:
                late[key] += 1
    return pushes, late


def _row(contender, pushes, base, late):
    after, whole = zip(*pushes)
    base_after, base_whole = zip(*base)
    percentiles = zip(("p50 ms", "p95 ms", "p99 ms"), milliseconds(after, (50, 95, 99)))
    return {
        "contender": contender,
        "n": len(pushes),
        "late": late,
        **dict(percentiles),
        "ratio": ratio(after, base_after),
        "with COMMIT: p50 ms": milliseconds(whole, [50])[0],
        "with COMMIT: ratio": ratio(whole, base_whole),
    }


class _Client:
    """A client of the bus of the stack's Odoo, with a channel of its own; it ends with ``exits``."""

    _channels = iter("latency %d" % number for number in range(10**6))

    def __init__(self, stack, exits):
        self._stack = stack
        self._channel = next(self._channels)
        self._client = exits.enter_context(stack.client([self._channel], listening=False))
        # The first instance needs its direct connection before the second one looks for a leader.
        wait_for_push(stack, self._channel, self._client)

    def push(self, number):
        """Send a message; return the seconds to its receipt from after the COMMIT and from before it.

        :raise TimeoutError: it does not arrive
        """
        sent = self._stack.send(self._channel, number)
        received = self._client.wait_for(number, _PATIENCE)
        return received.at - sent.committed, received.at - sent.at
