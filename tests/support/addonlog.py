"""What the addon has written to Odoo's log."""

import re
from typing import NamedTuple

from stack.waiting import wait_until

_RECORD = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (\d+) ([A-Z]+) \S+ (\S+?): (.*)", re.MULTILINE)
_ADDON = "odoo.addons.bus_alt_connection."
_CONFIRMED = re.compile(r"listening( again)? on [^(]*\bimbus( through process \d+)? at .*, confirmed in [\d.]+ ms")


class Record(NamedTuple):
    pid: int
    level: str
    message: str  # all lines of it


def bus_pid(stack):
    """Return the id of the process that listens on imbus; in prefork another one listens for cron."""
    return stack.odoo.processes().gevent or stack.odoo.pid


def records(stack, since=0, pid=None):
    """Return what the addon said after a mark in Odoo's log, in whichever process or in that one."""
    log = stack.odoo.log_since(since)
    starts = list(_RECORD.finditer(log))
    ends = [start.start() for start in starts[1:]] + [len(log)]
    found = [
        Record(int(start[1]), start[2], log[start.start(4) : end].rstrip())
        for start, end in zip(starts, ends)
        if start[3].startswith(_ADDON)
    ]
    return [record for record in found if pid in (None, record.pid)]


def troubles(stack, since=0, pid=None):
    """Return those of :func:`records` that an operator would have to look at."""
    return [record for record in records(stack, since, pid) if record.level not in ("DEBUG", "INFO")]


def wait_until_confirmed(stack, since=0, deadline=20.0):
    """Wait until the bus listens and has heard itself; return the record that says so after a mark in the log."""

    def confirmed():
        found = records(stack, since, bus_pid(stack))
        return next((record for record in found if _CONFIRMED.match(record.message)), None)

    return wait_until(confirmed, deadline, "a confirmed listener of the bus", 0.05, stack.odoo.log_tail)


def wait_for_record(stack, pattern, since=0, deadline=20.0):
    """Return the first match of ``pattern``, from the beginning of a message, after a mark in the log."""
    regex = re.compile(pattern)

    def find():
        return next(filter(None, (regex.match(record.message) for record in records(stack, since))), None)

    return wait_until(find, deadline, "%r in the log of odoo" % pattern, 0.05, stack.odoo.log_tail)
