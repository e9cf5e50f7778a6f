"""Faults at random, for as long as you like, with many clients: is anything lost or doubled?

    python -m tools.soak MINUTES [--seed N]

Messages flow all the time on two Odoo 19.0, prefork, of one machine and with one database, so that their listeners
share one direct connection. The seed decides which faults there are, and for how long; it does not decide how fast the
machine is.
"""

import argparse
import bisect
import collections
import contextlib
import itertools
import random
import re
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import psycopg2
from tabulate import tabulate

from stack.archive import CACHE
from stack.clients import Client
from stack.stack import Stack
from stack.waiting import wait_until
from tests.support.addonlog import wait_until_confirmed

from .soak_faults import CRON_WORKERS, FAULTS, FAULTS_OF_PROCESSES, leader

CLIENTS = 50
CHANNELS = 10
PER_SECOND = 28
# Seconds; what lasts longer is got over before the next fault begins.
LONG = 4
# Seconds that the last messages may take to arrive; a check of the listener has time to fail meanwhile.
PATIENCE = 60
# Seconds by which a message may be later than the longest fault is long.
ALLOWED = 5
LOGS = CACHE / "soak"
ENVIRONMENT = {"IMDISPATCHER_CHECK_INTERVAL": "5", "IMDISPATCHER_DB_CONNECT_TIMEOUT": "2"}


class Fault(NamedTuple):
    name: str
    began: float  # time.monotonic()
    length: float  # seconds


def send(stack, sent, stopped):
    """Send steadily, through the pooler, until ``stopped``.

    :param sent: channel -> message -> time.monotonic() right before its NOTIFY; what is sent is added
    """
    with contextlib.closing(stack.sender()) as sender:
        for number in itertools.count():
            if stopped.wait(1 / PER_SECOND):
                return
            message, channel = "message %d" % number, "channel %d" % (number % CHANNELS)
            try:
                sent[channel][message] = sender.send(channel, message).at
            except psycopg2.Error:
                # It may be there or not: it does not count.
                stopped.wait(0.2)


def soak(minutes, seed):
    """Run for so many minutes; return what :func:`report` does. The logs of both Odoos are kept in :data:`LOGS`."""
    chance = random.Random(seed)
    sent = collections.defaultdict(dict)
    with contextlib.ExitStack() as exits:
        stacks = _start(exits)
        clients = _connect(exits, stacks)
        for stack in stacks:
            wait_until_confirmed(stack)
        stopped = threading.Event()
        pool = exits.enter_context(ThreadPoolExecutor(1))
        exits.callback(stopped.set)
        sending = pool.submit(send, stacks[0], sent, stopped)
        began = time.monotonic()
        faults, bugs = [], []
        for name, fault in _faults_in_turn(chance):
            time.sleep(chance.uniform(0.5, 4))
            if sending.done() or time.monotonic() - began >= 60 * minutes:
                break
            try:
                if name in FAULTS_OF_PROCESSES or faults and faults[-1].length > LONG:
                    _wait_until_all_hear(stacks, clients, sent)
                since = time.monotonic()
                print("%4d s  %s" % (since - began, name), flush=True)
                fault(stacks, chance)
                faults.append(Fault(name, since, time.monotonic() - since))
            except TimeoutError as error:
                # What came of the messages is of interest all the same.
                bugs.append("%4d s  %s: %s" % (time.monotonic() - began, name, str(error).partition("\n")[0]))
                print(bugs[-1], flush=True)
        stopped.set()
        sending.result()
        _wait_for_the_last(clients, sent)
        for stack in stacks:
            bugs += re.findall(r".*bus_alt_connection.*internal error.*", stack.odoo.log())
    return report(began, clients, sent, faults, bugs)


def _start(exits):
    LOGS.mkdir(exist_ok=True)
    # With each statement in it, the log of the server would be of gigabytes.
    quiet = {"settings": {"log_statement": "none"}}
    conf = {"max_cron_threads": CRON_WORKERS}
    stack = exits.enter_context(Stack("19.0", 2, environment=ENVIRONMENT, proxy=True, conf=conf, server_options=quiet))
    stacks = [stack, exits.enter_context(stack.another())]
    for number, one in enumerate(stacks, 1):
        exits.callback(shutil.copy, one.odoo.log_path, LOGS / ("odoo-%d.log" % number))
    return stacks


def _connect(exits, stacks):
    """Return the channel of each client, by the client; half of them are of each Odoo."""
    sessions = [stack.odoo.log_in().cookies["session_id"] for stack in stacks]
    clients = {}
    for number in range(CLIENTS):
        stack = stacks[number % 2]
        client = exits.enter_context(Client(stack.odoo, sessions[number % 2]))
        clients[client] = "channel %d" % (number // 2 % CHANNELS)
        client.subscribe([clients[client]], stack.last_id())
    return clients


def _faults_in_turn(chance):
    """Yield names and functions of faults: each once in every round, in an order of the round's own."""
    faults = [*FAULTS.items(), *FAULTS_OF_PROCESSES.items()]
    while True:
        yield from chance.sample(faults, len(faults))


def _wait_until_all_hear(stacks, clients, sent):
    """Wait until all listen through one process, and each client has heard what was sent since this was called."""
    leader(stacks)
    since = time.monotonic()

    def all_hear():
        return all(
            sent[channel].get(message, 0) > since
            for client, channel in clients.items()
            for message in client.messages[-1:] or [None]
        )

    wait_until(all_hear, PATIENCE, "all clients to hear")


def _wait_for_the_last(clients, sent):
    def all_there():
        return all(sent[channel].keys() <= set(client.messages) for client, channel in clients.items())

    with contextlib.suppress(TimeoutError):
        wait_until(all_there, PATIENCE, "the last messages", 0.5)
    # What is doubled comes late.
    time.sleep(3)


def report(began, clients, sent, faults, bugs):
    """Return what became of the messages, as lines, and whether all is well."""
    longest = max([fault.length for fault in faults], default=0)
    begins = [fault.began for fault in faults]
    names = ["none yet", *[fault.name for fault in faults]]
    gaps = collections.defaultdict(list)  # name of the last fault before -> seconds until a message was delivered
    counts = collections.Counter()  # how often a message came -> how many did
    wrong = list(bugs)
    for number, (client, channel) in enumerate(clients.items()):
        arrivals = collections.defaultdict(list)
        for received in client.received:
            arrivals[received.message].append(received.at)
        for message, at in sent[channel].items():
            came = arrivals[message]
            counts[len(came)] += 1
            if came:
                gaps[names[bisect.bisect(begins, came[0])]].append(came[0] - at)
            if len(came) != 1 or came[0] - at > longest + ALLOWED:
                seconds = ", ".join("%.2f s" % (one - began) for one in came) or "never"
                wrong.append("client %d: %s, sent at %.2f s: %s" % (number, message, at - began, seconds))
    gap = max(itertools.chain.from_iterable(gaps.values()), default=0)
    lines = [
        _table(faults, gaps),
        "",
        "%d messages sent, for %d clients" % (sum(map(len, sent.values())), len(clients)),
        "delivered once %d, lost %d, doubled %d" % (counts[1], counts[0], sum(counts.values()) - counts[0] - counts[1]),
        "longest gap %.2f s, longest fault %.2f s" % (gap, longest),
        *wrong[:100],
    ]
    return lines, bool(counts[1]) and not wrong


def _table(faults, gaps):
    lengths = collections.defaultdict(list)
    for fault in faults:
        lengths[fault.name].append(fault.length)
    rows = [
        (name, len(lengths[name]), max(lengths[name], default=0), len(gaps[name]), max(gaps[name], default=0))
        for name in sorted({*lengths, *gaps})
    ]
    heads = ("last fault before", "times", "longest, s", "deliveries", "longest gap, s")
    return tabulate(rows, heads, tablefmt="simple", floatfmt=".2f")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("minutes", type=float)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    arguments = parser.parse_args()
    print("seed %d" % arguments.seed, flush=True)
    lines, well = soak(arguments.minutes, arguments.seed)
    print("\n".join(["", *lines, "seed %d" % arguments.seed]))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
