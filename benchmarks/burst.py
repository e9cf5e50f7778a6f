"""How many notifications a second come through when they come all at once."""

import concurrent.futures
import contextlib
import random
import time

from .contenders import new_stack, running
from .crowd import Crowd
from .figures import spread

HOW = """\
Odoo 19.0, prefork. Four connections send as fast as they can, each message and its NOTIFY in two transactions as Odoo
does; straight to PostgreSQL for all contenders, or the pooler's own pace is what would be measured. With one client all
are for it; with 200 clients each has its own share of the same number. The clients are websockets in a process of their
own. "delivered": messages divided by the seconds from the first sending to the last receipt; "sent": by the seconds of
sending, so that more can not be delivered. The contenders take turns in three rounds of random order. Ratios are to (a)
in the same round."""

_SENDERS = 4


def run(quick, tell):
    count = 1000 if quick else 10000
    keys = ("a", "e") if quick else ("a", "c", "d", "e")
    stacks = {key: new_stack(key, "19.0", workers=2) for key in keys}
    with running(stacks):
        for clients in (1, 20 if quick else 200):
            with contextlib.ExitStack() as exits:
                crowds = {key: exits.enter_context(Crowd(stack, clients)) for key, stack in stacks.items()}
                runs = {key: [] for key in keys}
                for _ in range(1 if quick else 3):
                    for key in random.sample(keys, len(keys)):
                        tell("%d to %d client(s): %s" % (count, clients, key))
                        runs[key].append(_burst(stacks[key], crowds[key], count, clients))
                yield "%d clients" % clients, {key: _figures(runs[key], runs["a"]) for key in keys}


def _figures(runs, base):
    return {
        "messages": [one["messages"] for one in runs],
        "lost": sum(one["lost"] for one in runs),
        "doubled": sum(one["doubled"] for one in runs),
        "delivered_per_second": spread([one["delivered"] for one in runs], 0),
        "sent_per_second": spread([one["sent"] for one in runs], 0),
        "ratio": spread(
            [one["delivered"] / first["delivered"] for one, first in zip(runs, base) if first["delivered"]]
        ),
        "problems": sorted({text for one in runs for text in one["problems"]}),
    }


def _burst(stack, crowd, count, clients):
    _wake(stack, crowd)
    began = time.monotonic()

    def send(first):
        with contextlib.closing(stack.sender(direct=True)) as sender:
            for number in range(first, count, _SENDERS):
                sender.send("one-%d" % (number % clients), number)
        return time.monotonic()

    with concurrent.futures.ThreadPoolExecutor(_SENDERS) as pool:
        sent = max(pool.map(send, range(_SENDERS))) - began
    received = crowd.receive(count, 60)
    numbers = [message for message in received if isinstance(message, int)]
    last = max((max(received[message]) for message in numbers), default=None)
    return {
        "messages": count,
        "lost": count - len(numbers),
        "doubled": sum(len(received[message]) - 1 for message in numbers),
        "sent": count / sent,
        "delivered": len(numbers) / (last - began) if last else 0,
        "problems": crowd.problems,
    }


def _wake(stack, crowd):
    """Return when Odoo listens."""
    for number in range(50):
        stack.send("one-0", "wake %d" % number)
        if crowd.receive(1, 0.5):
            # Nothing of it is to be counted later.
            crowd.receive(1, 0.5)
            return
    raise TimeoutError("nothing arrives\n" + stack.odoo.log_tail())
