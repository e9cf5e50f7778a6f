"""What a soak has found out, as lines for people."""

import collections
from typing import NamedTuple

from tabulate import tabulate

NO_FAULT = "none yet"
# Odoo closes it when it can't ask the database, or is gone itself, and the client is as slow as it is to come back.
NO_WEBSOCKET = "websocket lost, until the client is back"
STOPPED = "the client's own gevent process stopped"
# Seconds by which a message may be later than the longest fault is long.
ALLOWED = 5


class Message(NamedTuple):
    channel: str
    at: float  # time.monotonic()


class Fault(NamedTuple):
    name: str
    began: float  # time.monotonic()
    ended: float
    stopped: object  # the Odoo whose gevent process stood still, or None

    @property
    def length(self):
        return self.ended - self.began


class Soak(NamedTuple):
    """All that was found out."""

    began: float  # time.monotonic()
    clients: dict  # each stack.clients.Client -> its channel
    sent: dict  # message -> Message
    faults: list  # of Fault
    bugs: list  # texts: lines of a log, and what else ought not to be


def report(found):
    """Return what became of the messages, as lines, and whether all is well."""
    longest = max([fault.length for fault in found.faults], default=0)
    gaps = collections.defaultdict(list)  # what a delivery is counted for -> seconds
    counts = collections.Counter()  # how often a message came -> how many did
    wrong = list(found.bugs)
    for number, (client, channel) in enumerate(found.clients.items()):
        times = collections.defaultdict(list)
        for received in client.received:
            times[received.message].append(received.at)
        for name, message in found.sent.items():
            if message.channel != channel:
                continue
            came = times[name]
            counts[len(came)] += 1
            if came:
                gaps[_reason(found.faults, client, message.at, came[0])].append(came[0] - message.at)
            if len(came) != 1 or came[0] - message.at > longest + ALLOWED:
                seconds = ", ".join("%.2f s" % (at - found.began) for at in came) or "never"
                wrong.append("client %d: %s, sent at %.2f s: %s" % (number, name, message.at - found.began, seconds))
    lines = [
        *_table(found, gaps).splitlines(),
        "",
        "%d messages sent, for %d clients" % (len(found.sent), len(found.clients)),
        "delivered once %d, lost %d, doubled %d" % (counts[1], counts[0], sum(counts.values()) - counts[0] - counts[1]),
        "longest gap %.2f s, longest fault %.2f s" % (max(sum(gaps.values(), []), default=0), longest),
        *wrong[:100],
    ]
    return lines, bool(counts[1]) and not wrong


def _table(found, gaps):
    lengths = collections.defaultdict(list)
    for fault in found.faults:
        lengths[fault.name].append(fault.length)
        if fault.stopped:
            lengths[STOPPED].append(fault.length)
    lengths[NO_WEBSOCKET] = [until - since for client in found.clients for since, until in client.away]
    rows = []
    for name in [NO_FAULT, *sorted(lengths)]:
        longest = max(lengths.get(name, []), default=0)
        rows.append((name, len(lengths.get(name, [])), longest, len(gaps[name]), max(gaps[name], default=0)))
    heads = ("fault, or the last before", "times", "longest fault, s", "deliveries", "longest gap, s")
    return tabulate(rows, heads, tablefmt="simple", floatfmt=".2f")


def _reason(faults, client, sent, received):
    """Return the name of what a delivery is counted for: the longest fault meanwhile, or the last one before."""
    if any(began < received and sent < ended for began, ended in client.away):
        return NO_WEBSOCKET
    before = [fault for fault in faults if fault.began < received]
    meanwhile = [fault for fault in before if fault.ended > sent] or before[-1:]
    if not meanwhile:
        return NO_FAULT
    fault = max(meanwhile, key=lambda one: one.length)
    return STOPPED if fault.stopped is client.odoo and sent < fault.ended else fault.name
