"""What has to hold, and the worst that was seen of each.

`Watch` is told of each message that is sent and received, of each line of the log and of each connection, and is
asked once a simulated second. A value above its limit is a problem of the run.
"""

import collections
import math
import re

from . import kernel

LATE, LOST, DUPLICATED, SILENT = "late (s)", "lost", "duplicated", "silent (s)"
CRON_LATE, CONNECTS, CONNECTIONS = "cron late (s)", "connects in 10 s", "connections"
HEARTBEATS, LINES, ADVICE, LEFT_OVER = "heartbeats a minute", "log lines in 3 min", "wrong advice", "left over"
SETTLED, CRASH, BUG = "settled (s)", "crash", "internal error"
LOCK_WAIT, STATEMENT = "waits for a lock (s)", "a statement takes (s)"
ALL = (LATE, CRON_LATE, LOST, DUPLICATED, SILENT, SETTLED, CONNECTIONS, CONNECTS, HEARTBEATS, LOCK_WAIT, STATEMENT)
ALL += (LINES, ADVICE, BUG, LEFT_OVER, CRASH)

# Modes that say that all is well.
WELL = ("listening", "shared")
# Seconds that a statement of the addon may wait for a lock, during which others queue up behind it, and that it may
# occupy a connection of the pooler's.
_LONGEST_LOCK_WAIT, _LONGEST_STATEMENT = 0.25, 30.0
# Connects of one process in ten seconds, and lines of its log in a minute.
_MOST_CONNECTS, _MOST_LINES = 20, 2
# Lines that one fault may cause in each process: lost, nothing listens, still not, cannot tell, and what ends them.
_LINES_OF_A_FAULT = 5
# Of one invariant a run reports no more problems than these.
_MOST_PROBLEMS = 3


class Worst:
    """The value of an invariant that came closest to its limit, or exceeded it most."""

    def __init__(self):
        self._found = {}

    def note(self, invariant, value, limit, where):
        share = value / limit if limit else float("inf") if value else 0.0
        if invariant not in self._found or share > self._found[invariant][0]:
            self._found[invariant] = (share, value, limit, where)

    def merge(self, other):
        for invariant, (_share, value, limit, where) in other._found.items():
            self.note(invariant, value, limit, where)

    def get(self, invariant):
        """Return ``(value, limit, where)``, None if it was never measured."""
        return self._found.get(invariant, (None,))[1:] or None


class _Sent:
    """A message of the bus that was notified at ``at``."""

    def __init__(self, row):
        self.at, self.row = kernel.K.now, row


class Watch:
    """The invariants of one run of ``world``."""

    def __init__(self, world):
        self._world = world
        self.worst = Worst()
        for invariant in (LOST, DUPLICATED, ADVICE, BUG, LEFT_OVER, CRASH):
            self.worst.note(invariant, 0, 0, "")
        self.worst.note(SILENT, 0, world.silent_limit, "")
        self._problems = collections.Counter()
        #: (process, loop) -> {what it waits for: _Sent or time}
        self._waiting = {}
        #: process -> how often its bus loop received each channel
        self._received = collections.defaultdict(collections.Counter)
        #: number of the last message that may come twice
        self.counts_duplicates_after = math.inf
        self._flagged = set()
        self._connects = collections.defaultdict(collections.deque)
        self._lines = collections.defaultdict(collections.deque)
        self._well_since = {}
        self.messages = self.lines = self.wrong_advice = self.most_connects = 0
        #: of ``(sent, process, database, seconds)``, and of ``(triggered, process, seconds)``
        self.history, self.cron_lateness = [], []
        #: process -> when messages arrived
        self.arrivals = collections.defaultdict(list)
        self.line_kinds = collections.Counter()

    def measure(self, invariant, value, limit, text):
        """Take note of a value; above ``limit`` it is a problem."""
        self.worst.note(invariant, value, limit, "seed %s (%s): %s" % (self._world.seed, self._world.title, text))
        if value > limit:
            self.problem(invariant, "%s: %.6g, limit %.6g" % (text, value, limit))

    def problem(self, invariant, text):
        self._problems[invariant] += 1
        if self._problems[invariant] <= _MOST_PROBLEMS:
            kernel.K.problem(invariant, text)

    # Messages

    def loop_begins(self, odoo, loop):
        kernel.K.note("the loop %s begins" % loop)
        self._waiting[odoo, loop] = {}
        if loop == "bus":
            self._received[odoo].clear()

    def loop_ends(self, odoo, loop):
        self._waiting.pop((odoo, loop), None)

    def notified(self, rows):
        """A NOTIFY of these rows was committed: all loops that listen have to get them."""
        self.messages += len(rows)
        for (odoo, loop), waiting in self._waiting.items():
            if loop == "bus":
                channels = {"c%d" % row.number: row for row in rows}
                # What a look-up found before the NOTIFY came is there already.
                waiting.update((name, _Sent(row)) for name, row in channels.items() if name not in self._received[odoo])

    def cron_notified(self, database):
        for (_odoo, loop), waiting in self._waiting.items():
            if loop != "bus" and self._world.expects_direct:
                waiting.setdefault(database, kernel.K.now)

    def received(self, odoo, loop, what):
        waiting = self._waiting.get((odoo, loop), {})
        sent = waiting.pop(what, None)
        if loop != "bus":
            if sent is not None:
                self.cron_lateness.append((sent, odoo, kernel.K.now - sent))
                self._judge_cron(odoo, loop, what, sent)
            return
        kernel.K.note("received %s" % what)
        self.arrivals[odoo].append(kernel.K.now)
        if sent is not None:
            self.history.append((sent.at, odoo, sent.row.database, kernel.K.now - sent.at))
            self._judge(odoo, what, sent)
        received = self._received[odoo]
        received[what] += 1
        if received[what] > 1 and int(what[1:]) > self.counts_duplicates_after:
            self.measure(DUPLICATED, received[what] - 1, 0, "%s got %s again" % (odoo.name, what))

    def lateness(self, process, since, until, databases, received_only=False):
        """Return how late messages that were sent in that time came to ``process``; infinite for what never came."""
        found = [
            seconds
            for at, odoo, database, seconds in self.history
            if odoo is process and since < at <= until and database in databases
        ]
        for sent in self._waiting.get((process, "bus"), {}).values():
            if not received_only and since < sent.at <= until and sent.row.database in databases:
                found.append(float("inf"))
        return found

    def cron_waits(self, but):
        """Return infinity for each trigger that a cron loop of a process other than ``but`` still waits for."""
        return [
            float("inf")
            for (odoo, loop), waiting in self._waiting.items()
            if loop != "bus" and odoo is not but
            for _database in waiting
        ]

    def forget_rows(self, rows):
        """These rows were lost with the server that had them: nobody can deliver them."""
        for (_odoo, loop), waiting in self._waiting.items():
            if loop == "bus":
                for row in rows:
                    waiting.pop("c%d" % row.number, None)

    def _judge(self, odoo, channel, sent):
        since = self._judged_since(odoo, "bus", sent)
        if since is not None:
            text = "%s got %s of %s, sent at %.3f" % (
                odoo.name,
                channel,
                sent.row.database,
                sent.at - kernel.BEGIN,
            )
            late = max(kernel.K.now - since, 0)
            if (odoo, channel) in self._flagged:
                self.worst.note(LATE, late, self._world.late_limit, "seed %s: %s" % (self._world.seed, text))
            else:
                self.measure(LATE, late, self._world.late_limit, text)

    def _judge_cron(self, odoo, loop, database, at):
        since = max(at, self._world.faults_over, odoo.resumed, odoo.busy.get(loop, 0))
        if since < kernel.K.now:
            text = "%s %s was told of %s, triggered at %.3f" % (odoo.name, loop, database, at - kernel.BEGIN)
            self.measure(CRON_LATE, kernel.K.now - since, self._world.cron_limit, text)

    def _judged_since(self, odoo, loop, sent):
        """Return the time from which lateness counts, None while it does not."""
        world = self._world
        since = max(sent.at, odoo.resumed, odoo.busy.get(loop, 0), world.answering_since[sent.row.database])
        if world.judged_after_faults:
            since = max(since, world.faults_over)
        return since if since <= kernel.K.now and not odoo.stopped else None

    # Once a second

    def look(self):
        for odoo in self._world.odoos:
            mode = self._mode(odoo)
            if mode not in WELL:
                self._well_since.pop(odoo, None)
            else:
                self._well_since.setdefault(odoo, kernel.K.now)
            self._look_at_waiting(odoo)
            self._look_at_lines(odoo)

    def _mode(self, odoo):
        modes = odoo.modes()
        return modes[0] if modes else None

    def _look_at_waiting(self, odoo):
        world = self._world
        for channel, sent in list(self._waiting.get((odoo, "bus"), {}).items()):
            since = self._judged_since(odoo, "bus", sent)
            if since is None:
                continue
            age = kernel.K.now - since
            if age > 2 and odoo in self._well_since:
                silent = kernel.K.now - max(since, self._well_since[odoo])
                text = "%s says that it listens, but has not got %s" % (odoo.name, channel)
                self.measure(SILENT, silent, world.silent_limit, text)
            if age > world.late_limit and (odoo, channel) not in self._flagged:
                self._flagged.add((odoo, channel))
                text = "%s waits for %s of %s, sent at %.3f"
                text %= odoo.name, channel, sent.row.database, sent.at - kernel.BEGIN
                self.measure(LATE, age, world.late_limit, text)

    def _look_at_lines(self, odoo):
        lines, now = self._lines[odoo], kernel.K.now
        while lines and lines[0] < now - 180:
            lines.popleft()
        faults = sum(1 for at in self._world.fault_times if at > now - 240)
        young = sum(1 for one in self._world.births if one > now - 240)
        limit = 3 * _MOST_LINES + _LINES_OF_A_FAULT * (faults + young)
        self.measure(LINES, len(lines), limit, odoo.name)

    def check_lost(self, patience):
        """All that was sent more than ``patience`` seconds ago has been received."""
        before = kernel.K.now - patience
        for (odoo, loop), waiting in self._waiting.items():
            missing = []
            for what, sent in waiting.items():
                at = sent.at if loop == "bus" else sent
                if max(at, odoo.resumed, odoo.busy.get(loop, 0)) < before:
                    missing.append(what)
            text = "%s has not got %s" % (odoo.name, ", ".join(missing[:5]))
            self.measure(LOST, len(missing), 0, text)

    # Connections and lines of the log

    def count_lines(self, text):
        """Return how many lines of the log have contained ``text``."""
        return sum(number for line, number in self.line_kinds.items() if text in line)

    def executed(self, backend, waited, took):
        """A statement ``waited`` for a lock, and ``took`` so many seconds besides."""
        if not backend.is_direct:
            self.measure(LOCK_WAIT, waited, _LONGEST_LOCK_WAIT, backend.client_name)
            self.measure(STATEMENT, took, _LONGEST_STATEMENT, backend.client_name)

    def connected(self, process, path):
        if path.name == "pooler" and self._world.expects_direct:
            return
        times = self._connects[process]
        times.append(kernel.K.now)
        while times[0] < kernel.K.now - 10:
            times.popleft()
        self.most_connects = max(self.most_connects, len(times))
        # What leads to a pooler is looked at closer, with more connections.
        if path.name != "pooler" and self._world.direct == "server":
            addresses = self._world.environ["IMDISPATCHER_DB_HOST"].count(",") + 1
            # A session at the wrong server is looked at with three connections more.
            most = _MOST_CONNECTS * (1.5 if self._world.recently("split") else 1)
            self.measure(CONNECTS, len(times), most * addresses, process.name)

    def logged(self, odoo, record):
        text = record.getMessage()
        kernel.K.note("LOG %s %s" % (record.levelname, text))
        self._lines[odoo].append(kernel.K.now)
        self.lines += 1
        self.line_kinds["%s %s" % (record.levelname, _kind_of_line(record))] += 1
        if "internal error" in text:
            self.measure(BUG, 1, 0, "%s: %s" % (odoo.name, text))
        if record.levelname == "ERROR":
            wrong = wrong_advice(self._world, text)
            self.wrong_advice += bool(wrong)
            if wrong:
                self.measure(ADVICE, 1, 0, "%s says: %s. But %s" % (odoo.name, text, wrong))


def _kind_of_line(record):
    """Return what a line of the log says, without names and numbers."""
    values = record.args if isinstance(record.args, tuple) else ()
    words = tuple(re.sub(r"[\d.]+", "N", one)[:60] if isinstance(one, str) else 0 for one in values)
    return record.msg % words if words else record.msg


# What the log may advise, by key words, and when that is right.
_ADVICE = [
    ("another server", lambda world: world.recently("split"), "both ways lead to the same server"),
    ("pooler", lambda world: world.direct != "server", "the direct way leads to PostgreSQL"),
    ("standby", lambda world: world.recently("standby"), "no standby is there"),
    ("silent", lambda world: world.recently("silent") or not world.expects_direct, "the path was never silent"),
    ("on database", lambda world: True, ""),
]


def wrong_advice(world, text):
    """Return why the advice of an ERROR is wrong; None if it is not."""
    for word, is_right, truth in _ADVICE:
        if word in text:
            return None if is_right(world) else truth
    return None
