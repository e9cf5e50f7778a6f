"""What a push costs a process that listens through another one of its host, beside one with its own connection."""

import contextlib
import random

from stack.waiting import wait_until

from .contenders import new_stack, running, start_more
from .figures import pushes
from .latency import OdooClient

HOW = """\
Odoo 19.0. Two PostgreSQLs, each with a PgBouncer and two instances of Odoo, at the same time: those on the one share a
direct connection, so that one process is the host and another, of the other instance, its guest; those on the other
have IMDISPATCHER_SHARE=0. Each of the four has a client with a channel of its own, and they take turns: one
notification each in rounds of random order, the next one when the last has arrived. From the return of the COMMIT with
the NOTIFY to the receipt by the client; "before": from right before that transaction, as COMMIT wakes all backends that
listen before it returns, and here that is a single one. Ratios are to the instance that was started as its counterpart
among those that do not share; their spread is that of ten blocks of rounds."""


def run(quick, tell):
    for workers in (2,) if quick else (2, 0):
        name = "19.0 %s" % ("prefork" if workers else "threaded")
        tell(name)
        yield name, _measure(workers, 60 if quick else 1000)


def _measure(workers, count):
    stacks = {key: new_stack(key, "19.0", workers=workers, jobs=False) for key in ("e", "e-own")}
    with running(stacks), contextlib.ExitStack() as exits:
        targets, pairs = {}, {}
        for key, stack in stacks.items():
            both = [stack, *start_more(stack, [{}], exits)]
            for number, one in enumerate(both):
                target = targets[key, number] = OdooClient(one, "sharing %d" % number)
                # The first one is to have its connection before the second one looks for a host.
                target.warm_up()
            if key == "e":
                modes = wait_until(lambda both=both: _host_and_guest(both), 30, "a host and a guest")
                pairs = {{"listening": "host", "shared": "guest"}[mode]: modes.index(mode) for mode in modes}
        taken = {name: [] for name in targets}
        for number in range(count):
            for name in random.sample(list(targets), len(targets)):
                taken[name].append(targets[name].push(number))
        figures = {}
        for role, number in pairs.items():
            own = taken["e-own", number]
            figures[role] = pushes(taken["e", number], own)
            figures["beside the " + role] = pushes(own, own)
    return figures


def _host_and_guest(stacks):
    """Return the modes of the processes that serve the bus, once they are one of each."""
    modes = [stack.odoo.health(30)["mode"] for stack in stacks]
    return sorted(modes) == ["listening", "shared"] and modes
