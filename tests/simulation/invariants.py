"""What has to hold, and the worst that was seen of each.

`Watch` is told of each message that is sent and received, of each line of the log and of each connection, and is
asked once a simulated second. A value above its limit is a problem of the run.
"""

import collections
import math

from . import kernel

LATE, LOST, DUPLICATED, SILENT = "late (s)", "lost", "duplicated", "silent (s)"
CRON_LATE, CONNECTS, CONNECTIONS = "cron late (s)", "connects in 10 s", "connections"
HEARTBEATS, LINES, ADVICE, LEFT_OVER = "heartbeats a minute", "log lines in 3 min", "wrong advice", "left over"
SETTLED, CRASH, BUG = "settled", "crash", "internal error"
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

#: what was sent: a message of the bus, or the name of a database for a cron loop
Sent = collections.namedtuple("Sent", "at what database")


class Watch:
    """The invariants of one run of ``world``."""

    def __init__(self, world):
        self._world = world
        self._problems = collections.Counter()
        #: invariant -> share of the limit, value and limit, of the value that came closest to it or exceeded it most
        self.worst = {}
        #: (process, loop) -> {what it waits for: Sent}
        self._waiting = {}
        #: process -> how often its bus loop, or an earlier one, received each channel
        self._received = collections.defaultdict(collections.Counter)
        #: number of the last message that may come twice
        self.counts_duplicates_after = math.inf
        self._connects = collections.defaultdict(collections.deque)
        self._lines = collections.defaultdict(collections.deque)
        self._well_since = {}
        self.messages = self.most_connects = 0
        #: of ``(process, Sent, seconds)``, of all loops
        self._history = []
        #: the log of all processes
        self.lines = []

    def measure(self, invariant, value, limit, text):
        """Take note of a value; above ``limit`` it is a problem."""
        found = value / limit if limit else value, value, limit
        self.worst[invariant] = max(found, self.worst.get(invariant, found))
        if value > limit:
            self._problems[invariant] += 1
            if self._problems[invariant] <= _MOST_PROBLEMS:
                kernel.K.problem(invariant, "%s: %.6g, limit %.6g" % (text, value, limit))

    # Messages

    def loop_begins(self, odoo, loop):
        kernel.K.note("the loop %s begins" % loop)
        self._waiting[odoo, loop] = {}

    def loop_ends(self, odoo, loop):
        self._waiting.pop((odoo, loop), None)

    def notified(self, rows):
        """A NOTIFY of these rows was committed: all loops that listen have to get them."""
        self.messages += len(rows)
        sent = [Sent(kernel.K.now, "c%d" % row.number, row.database) for row in rows]
        for (odoo, loop), waiting in self._waiting.items():
            if loop == "bus":
                # What a look-up found before the NOTIFY came is there already.
                waiting.update((one.what, one) for one in sent if one.what not in self._received[odoo])

    def cron_notified(self, database):
        for (odoo, loop), waiting in self._waiting.items():
            # A process that has just started leaves what was triggered before it listened to Odoo's timer.
            if loop != "bus" and self._world.expects_direct and kernel.K.now > odoo.resumed + 2.1:
                waiting.setdefault(database, Sent(kernel.K.now, database, database))

    def received(self, odoo, loop, what):
        sent = self._waiting.get((odoo, loop), {}).pop(what, None)
        if sent is not None:
            self._history.append((odoo, sent, kernel.K.now - sent.at))
            (self._judge if loop == "bus" else self._judge_cron)(odoo, loop, sent)
        if loop == "bus":
            kernel.K.note("received %s" % what)
            self._received[odoo][what] += 1
            if int(what[1:]) > self.counts_duplicates_after:
                self.measure(DUPLICATED, self._received[odoo][what] - 1, 0, "%s got %s" % (odoo.name, what))

    def lateness(self, process, since, databases):
        """Return how late what was sent after ``since`` came to ``process``; infinite for what did not come in 30 s."""
        found = [(sent, seconds) for odoo, sent, seconds in self._history if odoo is process]
        for (odoo, _loop), waiting in self._waiting.items():
            if odoo is process:
                found += [(sent, math.inf) for sent in waiting.values()]
        until = kernel.K.now - 30
        return [seconds for sent, seconds in found if since < sent.at <= until and sent.database in databases]

    def forget_rows(self, rows):
        """These rows were lost with the server that had them: nobody can deliver them."""
        for (_odoo, loop), waiting in self._waiting.items():
            if loop == "bus":
                for row in rows:
                    waiting.pop("c%d" % row.number, None)

    def _judge(self, odoo, loop, sent):
        """Measure how late a message is, which has arrived or not; return that, or None while it does not count."""
        world = self._world
        since = max(self._able_since(odoo, loop, sent), world.answering_since[sent.database])
        if world.judged_after_faults:
            since = max(since, world.faults_over)
        if since > kernel.K.now or odoo.stopped:
            return None
        text = "%s waits for %s of %s, sent at %.3f" % (odoo.name, sent.what, sent.database, sent.at - kernel.BEGIN)
        self.measure(LATE, kernel.K.now - since, world.late_limit, text)
        return kernel.K.now - since

    def _judge_cron(self, odoo, loop, sent):
        since = max(self._able_since(odoo, loop, sent), self._world.faults_over)
        text = "%s %s was told of %s, triggered at %.3f" % (odoo.name, loop, sent.what, sent.at - kernel.BEGIN)
        self.measure(CRON_LATE, kernel.K.now - since, self._world.cron_limit, text)

    def _able_since(self, odoo, loop, sent):
        """Return since when ``loop`` could have got ``sent``, as far as that is up to its process."""
        return max(sent.at, odoo.resumed, odoo.busy.get(loop, 0))

    # Once a second

    def look(self):
        for odoo in self._world.odoos:
            modes = odoo.modes()
            if modes and modes[0] in WELL:
                self._well_since.setdefault(odoo, kernel.K.now)
            else:
                self._well_since.pop(odoo, None)
            self._look_at_waiting(odoo)
            self._look_at_lines(odoo)

    def _look_at_waiting(self, odoo):
        for sent in list(self._waiting.get((odoo, "bus"), {}).values()):
            late = self._judge(odoo, "bus", sent)
            if late is not None and odoo in self._well_since:
                silent = min(late, kernel.K.now - self._well_since[odoo])
                text = "%s says that it listens, but has not got %s" % (odoo.name, sent.what)
                self.measure(SILENT, silent, self._world.silent_limit, text)

    def _look_at_lines(self, odoo):
        lines, now = self._lines[odoo], kernel.K.now
        while lines and lines[0] < now - 180:
            lines.popleft()
        # On a slow path, sessions come and go for as long as it lasts.
        causes = sum(at > now - 240 for at in self._world.disturbances) + (self._world.faults_over > now - 180)
        self.measure(LINES, len(lines), 3 * _MOST_LINES + _LINES_OF_A_FAULT * causes, odoo.name)

    def check_lost(self, patience):
        """All that was sent more than ``patience`` seconds ago has been received."""
        before = kernel.K.now - patience
        for (odoo, loop), waiting in self._waiting.items():
            missing = [sent.what for sent in waiting.values() if self._able_since(odoo, loop, sent) < before]
            text = "%s has not got %s" % (odoo.name, ", ".join(missing[:5]))
            self.measure(LOST, len(missing), 0, text)

    # Connections and lines of the log

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
            # A session at the wrong server is looked at with four connections more.
            most = _MOST_CONNECTS * (1.5 if self._world.recently("split") else 1)
            self.measure(CONNECTS, len(times), most * addresses, process.name)

    def logged(self, odoo, record):
        text = record.getMessage()
        kernel.K.note("LOG %s %s" % (record.levelname, text))
        self._lines[odoo].append(kernel.K.now)
        self.lines.append(text)
        self.measure(BUG, "internal error" in text, 0, "%s: %s" % (odoo.name, text))
        wrong = record.levelname == "ERROR" and _wrong_advice(self._world, text)
        self.measure(ADVICE, bool(wrong), 0, "%s says: %s. But %s" % (odoo.name, text, wrong))


# What the log may advise, by key words, and when that is right.
_ADVICE = [
    ("not the server", lambda world: world.recently("split"), "both ways lead to the same server"),
    ("pooler", lambda world: world.direct != "server", "the direct way leads to PostgreSQL"),
    ("standby", lambda world: world.recently("standby"), "no standby is there"),
    ("arrives from", lambda world: world.recently("silent") or not world.expects_direct, "the path was never silent"),
    ("on database", lambda world: True, ""),
]


def _wrong_advice(world, text):
    """Return why the advice of an ERROR is wrong; None if it is not."""
    for word, is_right, truth in _ADVICE:
        if word in text:
            return None if is_right(world) else truth
    return None
