"""A world: servers, ways, processes of Odoo and senders, and a plan of faults, all chosen by a seed."""

import collections
import gc
import logging
import math

from . import faults, invariants, kernel, postgres
from .kernel import BEGIN, Kernel, Stuck
from .loading import sleep
from .network import Path
from .odoo import BUS_CHANNEL, CRON, CRON_CHANNEL, GEVENT, THREADED, Odoo
from .pooler import Pooler

# Seconds: outages are short, medium or long.
_OUTAGES = ((0.1, 1), (1, 10), (10, 120), (120, 600))
# Seconds of trouble with many faults.
_TROUBLE = (5, 30, 150)
# Seconds that are allowed beyond the check interval if everything happens at once.
_ALL_AT_ONCE = 45.0
# Channels that the addon gives Odoo's loop in a second of what it has looked up, and at most for so many seconds. Each
# outage has the last minute looked up by date, twice: when polling begins, and when it ends.
_CHANNELS_EACH_SECOND, _MOST_PORTIONS, _LOOKED_UP_AGAIN = 50.0, 10.0, 2 * 85.0
# Seconds that a look-up takes at most, and from the begin of a slow one to the next one while polling.
_SLOWEST_LOOK_UP, _LONGEST_PAUSE = 40.0, 60.0
# Of the transactions, so many have many rows.
_LARGE, _SIZES = 0.05, (3, 60)
# How long what the log advises stays right after the cause has gone.
_RECENTLY = 130.0


class World:
    """One run: ``run`` returns the problems.

    ``kinds``: names of faults, which are in `faults.KINDS`; ``options`` replace attributes that the seed chooses.
    """

    def __init__(self, addon, seed, kinds, keep_trace=False, **options):
        self.addon, self.seed = addon, seed
        self.kernel = Kernel(seed, keep_trace)
        self.kernel.world = self
        self.rng = self.kernel.rng
        self.kinds = [faults.KINDS[name] for name in kinds]
        self._choose()
        vars(self).update(options)
        self.kernel.head_start = self.head_start
        self.kernel.set_preemption(self.preemption)
        self._build()
        for kind in self.kinds:
            if kind.is_setting:
                kind.begin(self)
                self._last[kind.cause] = math.inf
        self._set_limits()
        self.watch = invariants.Watch(self)
        self.cluster.executed = self.watch.executed

    @property
    def title(self):
        """What the run is about, in a line."""
        names = [kind.name for kind in self.kinds]
        if len(names) <= 2:
            return " + ".join(names) or "no faults"
        return ", ".join(["all kinds", *(kind.name for kind in self.kinds if kind.is_setting)])

    def _choose(self):
        """Have the seed choose how the world is."""
        rng = self.rng
        self.databases = ["d1", "d2", "d3"][: rng.choice((1, 2, 3))]
        self.check_interval = rng.choice((60, 12, 12, 6, 6))
        self.poll_interval = rng.choice((5, 2))
        self.share = rng.random() < 0.85
        self.processes = [rng.choice((GEVENT, CRON, THREADED)) for _number in range(rng.choice((1, 2, 3, 4, 5)))]
        self.machines = rng.choice((1, 1, 1, 2))
        self.normal_rate = rng.choice((0.1, 0.5, 2))
        self.long_transactions = rng.choice((0, 0.02, 0.2))
        #: notifications that a feed has room for, None: as many as usual
        self.feed_size = rng.choice((None, None, 40))
        self.preemption = rng.choice((0, 0.002, 0.02, 0.1))
        self.head_start = rng.choice((0.0, 0.0, 0.2))
        self.pool_size = rng.choice((1, 2, 5))

    def _build(self):
        """Make the servers and the ways to them."""
        self.rate = self.normal_rate
        self.environ = {
            "IMDISPATCHER_DB_HOST": "direct",
            "IMDISPATCHER_CHECK_INTERVAL": str(self.check_interval),
            "IMDISPATCHER_POLL_INTERVAL": str(self.poll_interval),
            "IMDISPATCHER_SHARE": "1" if self.share else "0",
        }
        self.last_message = 0
        #: how many faults of each cause last, and when one of it was last seen
        self._lasting, self._last = collections.Counter(), collections.Counter()
        #: since when the rows of a database can be looked up; infinite: they cannot
        self.answering_since = collections.Counter()
        #: what the direct way leads to: "server", or a kind of pooler
        self.direct = "server"
        self.cluster, self.server = postgres.Cluster(self.databases), postgres.Server()
        self.pooler = Pooler(self.pool_size)
        self.paths = {"direct": Path("direct", self.server), "pooler": Path("pooler", self.pooler)}
        #: when faults began or ended, and processes were born
        self.disturbances = []
        #: infinite while a fault lasts
        self.faults_over = BEGIN

    def _set_limits(self):
        """Decide how late a message may be; for a pair what each kind costs adds up."""
        self.judged_after_faults = False
        self.cron_limit = self.check_interval + 10.0
        self.silent_limit = self.check_interval + 3.0 + self.seconds_of_portions()
        if len(self.kinds) > 2:
            self.judged_after_faults = True
            self.cron_limit = self.silent_limit = self.check_interval + _ALL_AT_ONCE
            self.late_limit = self.cron_limit + self.seconds_until_polled()
            return
        if len(self.kinds) == 1:
            self.late_limit = faults.limit(self.kinds[0].late, self)
            self.judged_after_faults = self.kinds[0].judged == faults.OVER
        else:
            self.late_limit = sum(faults.limit(kind.late_together, self) for kind in self.kinds) or 1.0
            self.judged_after_faults = any(kind.together == faults.OVER for kind in self.kinds)
            # A fault of the only way leaves no other one.
            self.judged_after_faults |= self.direct_path is self.paths["pooler"]
            self.silent_limit += self.late_limit
        if self.judged_after_faults:
            self.late_limit += _MOST_PORTIONS
        self.late_limit += self.seconds_until_polled()

    # What faults and invariants ask for

    def seconds_of_portions(self):
        """Return how long a message may wait for others that were found in the same look-ups."""
        rows = 1 - _LARGE + _LARGE * sum(_SIZES) / len(_SIZES)
        channels = self.normal_rate * rows * _LOOKED_UP_AGAIN
        return min(channels / _CHANNELS_EACH_SECOND, 2 * _MOST_PORTIONS)

    def seconds_until_polled(self):
        """Return how long, after slow look-ups, the addon may wait for the next one while it polls.

        They take at most a tenth of the time, and the addon does not know that the next one will be fast.
        """
        is_slow = any(kind.name.endswith("slow") for kind in self.kinds)
        return _SLOWEST_LOOK_UP + _LONGEST_PAUSE if is_slow and not self.expects_direct else 0.0

    @property
    def now(self):
        return self.kernel.now

    @property
    def odoos(self):
        return [process for process in self.kernel.processes if isinstance(process, Odoo)]

    @property
    def expects_direct(self):
        """Whether listeners can hear by way of where they are led to."""
        return self.direct != "transaction pooler"

    @property
    def direct_path(self):
        return self.paths["direct" if "IMDISPATCHER_DB_HOST" in self.environ else "pooler"]

    def direct_connections(self, process):
        """Return the open connections of ``process`` past the pooler."""
        links = [getattr(description, "link", None) for description in process.descriptors.values()]
        return [link for link in links if link and link.path.name != "pooler"]

    def after(self, seconds, do):
        self.kernel.after(seconds, do)

    def recently(self, cause):
        """Return whether a fault of that cause lasts, or has until recently."""
        return self._lasting[cause] > 0 or self._is_recent(self._last[cause], self.now)

    def _is_recent(self, when, now):
        return when > now - _RECENTLY - self.check_interval

    def start_server(self):
        if not self.cluster.up:
            self.cluster.start()
            self.pooler.serve()

    def add_database(self):
        name = "d%d" % (len(self.databases) + 1)
        self.databases.append(name)
        self.cluster.add_database(name)
        # What Odoo never used nobody asks for; so each process works on it before anything is sent.
        for process in self.odoos:
            if process.installed:
                kernel.Task(process, process.work_on, ([name],), "%s/request" % process.name)

    def start_odoo(self, kind):
        self.disturbances.append(self.now)
        return Odoo(self, kind)

    def replace_later(self, process, seconds):
        self.after(seconds, lambda: len(self.odoos) < len(self.processes) and self.start_odoo(process.kind))

    # Senders

    def send(self):
        """Have Odoo send something now, and again and again."""
        rng = self.rng
        self.after(rng.expovariate(self.rate), self.send)
        if rng.random() < 0.03:
            self.trigger_cron()
        database = rng.choice(self.databases)
        if not self._can_send() or database in self.cluster.locked:
            return
        transaction = postgres.Transaction(self.cluster, database)
        number = rng.choice(_SIZES) if rng.random() < _LARGE else 1
        seconds = rng.expovariate(1 / 15 if rng.random() < self.long_transactions else 1 / 0.02)
        self.after(rng.uniform(0, seconds), lambda: self._write(transaction, number))
        self.after(seconds, lambda: self._commit(transaction))

    def _can_send(self):
        return self.cluster.up and not self.pooler.away and not self.pooler.hanging

    def _write(self, transaction, number):
        for _row in range(number if transaction.alive else 0):
            self.last_message += 1
            channel = '["%s","c%d"]' % (transaction.database, self.last_message)
            transaction.write(channel, self.last_message, savepoint=self.rng.random() < 0.3)

    def _commit(self, transaction):
        rows = transaction.end(commit=self.rng.random() < 0.97)
        if rows:
            # Odoo's hook sends the NOTIFY after the commit, in a transaction of its own.
            wait = self.rng.expovariate(1 / 0.01) if self.rng.random() < 0.9 else self.rng.uniform(0, 8)
            self.kernel.note("commit of %s in %s" % (_numbers(rows), rows[0].database))
            self.after(wait, lambda: self._notify(rows))

    def _notify(self, rows):
        # The rows may have been lost in a failover meanwhile.
        table = self.cluster.rows(rows[0].database)
        if self._can_send() and rows[0] in table[-500:]:
            self.kernel.note("NOTIFY of %s" % _numbers(rows))
            self.watch.notified(rows)
            self.cluster.notify(1, "postgres", BUS_CHANNEL, "[%s]" % ",".join(row.channel for row in rows))

    def trigger_cron(self):
        """Have Odoo wake the cron loops for one of the databases."""
        if self._can_send():
            database = self.rng.choice(self.databases)
            self.kernel.note("NOTIFY of cron in %s" % database)
            self.watch.cron_notified(database)
            self.cluster.notify(1, "postgres", CRON_CHANNEL, database)

    # Phases

    def run(self):
        """Run everything; return the problems, of ``(when, invariant, text)``."""
        try:
            self._begin()
            for _cycle in range(2):
                if not self.kernel.problems:
                    self.make_trouble()
                    self.calm()
            self._finish()
        except (Stuck, AssertionError) as error:
            self.kernel.problem(invariants.CRASH, "%s: %s" % (type(error).__name__, error))
        return self.kernel.problems

    def _begin(self):
        self.send()
        for kind in self.processes:
            self.after(self.rng.uniform(0, 3), lambda kind=kind: self.start_odoo(kind))
        # Processes change to the best leader, and then look up what they may have missed.
        usual, self.late_limit = self.late_limit, self.late_limit + self.seconds_of_portions()
        self.after(self.check_interval + 49, lambda: setattr(self, "late_limit", usual))
        self.calm()

    def advance(self, seconds):
        """Let time pass, and look once a second."""
        end = self.now + seconds
        while self.now < end:
            self.kernel.run(min(self.now + 1, end))
            self.watch.look()

    def make_trouble(self):
        """Have the kinds of faults happen that this run is about, until all are over."""
        kinds = [kind for kind in self.kinds if not kind.is_setting]
        self.kernel.note("--- trouble: %s" % self.title)
        if len(self.kinds) <= 2:
            for kind in kinds:
                self.after(
                    self.rng.uniform(0, 12),
                    lambda kind=kind: self.happen(kind, self.rng.uniform(*self.rng.choice(_OUTAGES))),
                )
            self.faults_over = float("inf") if kinds else self.now
            self.advance(15)
            while sum(self._lasting.values()):
                self.advance(1)
        else:
            self._make_all_trouble(kinds)
        self._heal()

    def _make_all_trouble(self, kinds):
        seconds = self.rng.choice(_TROUBLE)
        end, at = self.now + seconds, self.now
        self.faults_over = float("inf")
        while True:
            at += self.rng.expovariate(len(kinds) / 60 if seconds > 5 else 0.5)
            if at > end:
                break
            kind, longest = self.rng.choice(kinds), end - at
            lasts = min(self.rng.expovariate(1 / self.rng.choice((0.2, 3, 30))), longest)
            self.kernel.at(at, lambda kind=kind, lasts=lasts: self.happen(kind, lasts))
        self.advance(seconds)

    def happen(self, kind, seconds):
        """Begin a fault of ``kind`` and end it after ``seconds``."""
        self.kernel.note("FAULT %s for %.1f s" % (kind.name, seconds))
        self.disturbances.append(self.now)
        self.faults_over = math.inf
        self._lasting[kind.cause] += 1
        began, end = self.now, kind.begin(self)
        if end is None:
            self._fault_is_over(kind)
            return

        def over():
            self.kernel.note("END of %s" % kind.name)
            self.disturbances.append(self.now)
            end()
            # Processes that stood still notice only now what was recent then.
            for cause, last in self._last.items():
                if self._is_recent(last, began):
                    self._last[cause] = max(last, self.now)
            self._fault_is_over(kind)

        self.after(seconds, over)

    def _fault_is_over(self, kind):
        self._lasting[kind.cause] -= 1
        self._last[kind.cause] = max(self.now, self._last[kind.cause])
        if len(self.kinds) <= 2 and not sum(self._lasting.values()):
            self.faults_over = self.now

    def _heal(self):
        """All faults have ended; end what they have left, and have as many processes as before."""
        for process in list(self.kernel.processes):
            if isinstance(process, Odoo):
                process.busy = {loop: min(until, self.now) for loop, until in process.busy.items()}
            else:
                process.kill()
        while len(self.odoos) < len(self.processes):
            self.start_odoo(self.rng.choice(self.processes))
        self.faults_over = min(self.faults_over, self.now)
        self.kernel.note("--- calm")

    def calm(self):
        """Wait until everything is as it should be, then see that nothing happens for a while."""
        self.advance(self.check_interval + 50)
        unsettled = self.unsettled()
        self.watch.measure(invariants.SETTLED, len(unsettled), 0, "; ".join(unsettled))
        self.watch.check_lost(self.check_interval + _ALL_AT_ONCE + self.seconds_until_polled())
        if not self.kernel.problems:
            self._idle()

    def _idle(self):
        """Nothing is wrong: no connects, few heartbeats, no lines in the log, each message once."""
        watch, minutes = self.watch, max(60, self.check_interval) / 60
        beats, lines = self.cluster.heartbeats, len(watch.lines)
        watch.counts_duplicates_after = self.last_message
        self.advance(minutes * 60)
        watch.counts_duplicates_after = math.inf
        span = max(0.9 * (self.check_interval * 2 / 3 - 1), 1)
        beats = self.cluster.heartbeats - beats
        if self.expects_direct:
            # On a pooled connection only what a listener sent itself proves something. If a pooler has changed to
            # another server by itself, each process sends.
            direct = sum(len(self.direct_connections(process)) for process in self.odoos)
            watch.measure(invariants.CONNECTIONS, direct, self.connections_wanted(), "while all was well")
            senders = 1 if self.direct == "server" else len(self.odoos)
            watch.measure(invariants.HEARTBEATS, beats, 2 + 2 * senders * minutes * 60 / span, "while all was well")
            watch.measure(invariants.LINES, len(watch.lines) - lines, 0, "while all was well")

    def unsettled(self):
        """Return what is not as it should be, a list of texts."""
        bad, modes = [], []
        right = invariants.WELL if self.expects_direct else ("polling",)
        for process in self.odoos:
            found = process.modes()
            modes += found
            expected = right
            if not self.expects_direct and process.kind == CRON:
                expected = ("polling", "deaf")
            if not found or set(found) - set(expected):
                bad.append("%s is %s" % (process.name, found))
        if self.expects_direct:
            bad += self._wrong_connections(modes)
        return bad

    def connections_wanted(self):
        """Return how many direct connections there should be."""
        return len({process.machine for process in self.odoos}) if self.share else len(self.odoos)

    def _wrong_connections(self, modes):
        direct = [process.name for process in self.odoos for _link in self.direct_connections(process)]
        wanted = self.connections_wanted()
        if len(direct) != wanted:
            return ["%d direct connections: %s" % (len(direct), ", ".join(direct))]
        if modes.count("listening") != wanted:
            return ["modes %s" % modes]
        return []

    def _finish(self):
        """All processes end their loops: nothing is left."""
        if self.kernel.problems:
            return
        for process in self.odoos:
            process.ends = True
        self.kernel.run(self.now + 130)
        for _generation in range(3):  # a feed has to be gone first, then its listener
            gc.collect()
        self.kernel.run(self.now + 1)
        for process in self.odoos:
            left = [task.name for task in process.tasks]
            left += [type(description).__name__ for description in process.descriptors.values()]
            self.watch.measure(invariants.LEFT_OVER, len(left), 0, "%s: %s" % (process.name, left))


def forget():
    """End the last world and drop what could disturb the next run."""
    for process in list(kernel.K.processes):
        process.kill()
    kernel.K.forget()
    gc.collect()


def _numbers(rows):
    numbers = ["c%d" % row.number for row in rows]
    return ", ".join(numbers) if len(numbers) < 4 else "%s to %s" % (numbers[0], numbers[-1])


class LogHandler(logging.Handler):
    """Hand each line of the addon's log to the process that writes it, whose log may block."""

    def __init__(self):
        super().__init__(logging.INFO)

    def createLock(self):
        # logging's own lock would be one for all simulated processes.
        self.lock = None

    def handle(self, record):
        task = kernel.K and kernel.K.current
        if task is None or task.process.dead or not isinstance(task.process, Odoo):
            return
        process = task.process
        with process.log_lock:
            kernel.K.world.watch.logged(process, record)
            if process.log_seconds:
                sleep(process.log_seconds)


def set_up_logging():
    logger = logging.getLogger("bus_alt_connection")
    logger.addHandler(LogHandler())
    logger.propagate = False
    logger.setLevel(logging.INFO)
