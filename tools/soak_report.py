"""What a soak has found out, as lines for people."""

import collections
from typing import NamedTuple

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


class Sample(NamedTuple):
    """What a process takes."""

    at: float  # time.monotonic()
    kind: str
    megabytes: float
    descriptors: int


class Soak(NamedTuple):
    """All that was found out."""

    began: float  # time.monotonic()
    clients: dict  # each stack.clients.Client -> its channel
    sent: dict  # message -> Message
    faults: list  # of Fault
    samples: dict  # process id -> list of Sample
    bugs: list  # texts: lines of a log, and what else ought not to be


def report(found):
    """Return what became of the messages, as lines, and whether all is well."""
    gaps, counts, wrong = collections.defaultdict(list), collections.Counter(), []
    longest = _longest(found)
    allowed = max([one.length for one in found.faults], default=0) + ALLOWED
    for number, (client, channel) in enumerate(found.clients.items()):
        times = collections.defaultdict(list)
        for received in list(client.received):
            times[received.message].append(received.at)
        for name, message in found.sent.items():
            if message.channel != channel:
                continue
            came = times[name]
            counts["lost" if not came else "once" if len(came) == 1 else "doubled"] += 1
            if came:
                gaps[_reason(found.faults, client, message.at, came[0])].append(came[0] - message.at)
            if len(came) != 1 or came[0] - message.at > allowed:
                seconds = ", ".join("%.2f s" % (at - found.began) for at in came) or "never"
                wrong.append("client %d: %s, sent at %.2f s: %s" % (number, name, message.at - found.began, seconds))
    lines = [
        "%-40s %5s %13s %11s %13s"
        % ("fault, or the last before", "times", "longest fault", "deliveries", "longest gap")
    ]
    for name in [NO_FAULT, *sorted(longest)]:
        lengths, late = longest.get(name, []), gaps[name]
        row = (name, len(lengths) or "", "%.2f s" % max(lengths) if lengths else "", len(late), max(late, default=0))
        lines.append("%-40s %5s %13s %11d %11.2f s" % row)
    gap = max([max(late) for late in gaps.values() if late], default=0)
    lines += ["", *_processes(found.samples), ""]
    lines.append("%d messages sent, for %d clients" % (len(found.sent), len(found.clients)))
    lines.append(
        "delivered once %(once)d, lost %(lost)d, doubled %(doubled)d" % {"once": 0, "lost": 0, "doubled": 0, **counts}
    )
    lines.append("longest gap %.2f s, longest fault %.2f s" % (gap, allowed - ALLOWED))
    well = counts["once"] and not (counts["lost"] or counts["doubled"] or found.bugs) and gap <= allowed
    return lines + wrong[:100] + found.bugs, bool(well)


def _longest(found):
    """Return the seconds that each fault took, by its name; those that the clients' own server had included."""
    lengths = collections.defaultdict(list)
    for fault in found.faults:
        lengths[fault.name].append(fault.length)
        if fault.stopped:
            lengths[STOPPED].append(fault.length)
    lengths[NO_WEBSOCKET] = [until - since for client in found.clients for since, until in client.away]
    return lengths


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


def _processes(samples):
    """Return lines on the process of each kind that has lived longest."""
    lines = ["%-18s %9s %22s %22s" % ("longest lived", "after", "MB, begin and end", "descriptors")]
    lives = collections.defaultdict(list)
    for life in samples.values():
        lives[life[0].kind].append(life)
    for kind, all_lives in sorted(lives.items()):
        life = max(all_lives, key=lambda one: one[-1].at - one[0].at)
        first, last = life[0], life[-1]
        row = kind, last.at - first.at, first.megabytes, last.megabytes, first.descriptors, last.descriptors
        lines.append("%-18s %7d s %15.1f %6.1f %15d %6d" % row)
    return lines
