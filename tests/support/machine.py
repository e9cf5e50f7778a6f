"""Odoos beside each other on one machine, whose listening processes share a connection."""

import contextlib
import re
import time

import psutil

from stack.odoo import series_number
from stack.waiting import wait_until
from tests.support.addonlog import bus_pid, records

_LISTENS = re.compile(r"listening(?: again)? on [^(]*?(?: through process (\d+))? at \S+ \(database postgres, ")
_ENDS = re.compile(r"lost the listener|can't listen|the listener of database postgres is switching to another")
# Of the record, what tells who wrote it: the process, and "cron0" in the message or, in 20.0, in the logger's name.
_LOOKED_FOR_JOBS = re.compile(r" (\d+) DEBUG \S+ (odoo\.service\.server\S* .*?)polling for jobs")
_NAME = "@bus_alt_connection/"


class Machine:
    """Several Odoos with one user, one configuration and one series, to which somebody listens.

    :param stacks: one for each, see ``Stack.another``
    """

    def __init__(self, *stacks):
        self.stacks = stacks

    def start(self):
        """Start those Odoos that do not run, or of which some process does not answer."""
        for stack in self.stacks:
            if not stack.odoo.running:
                stack.odoo.start()
        for stack in self.stacks:
            wait_until(stack.odoo.is_up, 60, "all of Odoo to answer", 0.1, stack.odoo.log_tail)

    def listeners(self):
        """Return the stack of each process that listens, by its id."""
        found = {}
        for stack in self.stacks:
            if not stack.odoo.running:
                continue
            found[bus_pid(stack)] = stack
            if series_number(stack.series) >= 15:
                found.update((pid, stack) for pid in stack.odoo.processes().cron)
        return found

    def ways(self):
        """Return the process through which each of :meth:`listeners` does: it itself, or its leader; None: it does not.

        It is known by the log, where each says it once it has heard itself.
        """
        said = {}
        for stack in self.stacks:
            for one in records(stack):
                listens = _LISTENS.match(one.message)
                if listens or _ENDS.match(one.message):
                    said[one.pid] = listens and int(listens[1] or one.pid)
        return {pid: said.get(pid) for pid in self.listeners()}

    def settle(self, lasting=0.0, deadline=20.0):
        """Wait until all listen through one and the same process, and PostgreSQL has no other listener; return its id.

        :param lasting: seconds for which nothing has changed before
        """
        seen = [None, 0.0]

        def settled():
            now, ways = time.monotonic(), self.ways()
            if ways != seen[0]:
                seen[:] = ways, now
            leaders = set(ways.values())
            if len(leaders) != 1 or not leaders <= set(ways) or self.connected() != leaders:
                return None
            return now - seen[1] >= lasting and leaders.pop()

        def tail():
            lines = ["%s through %s" % way for way in self.ways().items()]
            lines += ["connected: %s" % sorted(self.connected())]
            return "\n".join(lines + [stack.odoo.log_tail() for stack in self.stacks])

        return wait_until(settled, deadline + lasting, "all to listen through one", 0.1, tail)

    def trigger_cron(self, deadline=10.0):
        """Have Odoo's cron triggered; returns when all that listen for it have looked for jobs.

        Odoo logs that with ``--log-handler=odoo.service.server:DEBUG``.
        """
        marks = {stack: stack.odoo.log_mark() for stack in self.stacks if stack.odoo.running}
        first = self.stacks[0]
        if series_number(first.series) < 15:
            return

        def looked():
            who = [set(_LOOKED_FOR_JOBS.findall(stack.odoo.log_since(mark))) for stack, mark in marks.items()]
            return all(len(names) == first.odoo.conf["max_cron_threads"] for names in who)

        with contextlib.closing(first.sender()) as sender:
            sender.notify(first.database, "cron_trigger")
        wait_until(looked, deadline, "all of cron to look for jobs", 0.05)

    def connected(self):
        """Return the ids of the processes that have a direct connection, by what PostgreSQL says."""
        names = [row.application_name for row in self.stacks[0].direct_connections()]
        pids = [int(re.match(r"odoo-listener-(\d+)$", name)[1]) for name in names]
        assert len(pids) == len(set(pids)), "one has several: %s" % names
        return set(pids)


def sharing_socket(pid):
    """Return the name of the socket at which a process leads, and how many follow; None: it does not lead."""
    # The end that listens has it, and those of its followers; their other ends have no name.
    names = [one.laddr for one in psutil.Process(pid).net_connections("unix") if one.laddr.startswith(_NAME)]
    return (names[0], len(names) - 1) if names else None
