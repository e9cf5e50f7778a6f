"""A virtual clock, and the threads of all simulated processes, which run one at a time.

Each simulated thread is a greenlet, a `Task`. `Kernel.run` chooses by the seed which of those that can
run goes on, until it waits or is preempted. The clock stands still while a task runs and jumps to the next
timer when none can run. Therefore a seed determines a whole run.
"""

import collections
import heapq
import itertools
import random
import traceback

from greenlet import GreenletExit, getcurrent, greenlet

#: the `Kernel` of the run under way; there is one at a time
K = None

# Monotonic seconds at which each run begins.
BEGIN = 1000.0
# A thread that was preempted goes on after so many seconds.
_PAUSES = (0,) * 60 + (0.001,) * 20 + (0.01,) * 8 + (0.2,)
# More steps than these mean that a thread turns in circles.
_MOST_STEPS, _MOST_STEPS_PER_SECOND = 200000, 20000
_NEVER = 1 << 60
#: statements until the next preemption, in a list because `point` has to be fast
LEFT = [_NEVER]


class Stuck(AssertionError):
    """A run that cannot go on."""


class Task:
    """One thread of a simulated process."""

    def __init__(self, process, target, args, name):
        self.process, self.name = process, name
        self.queued, self.over = False, False
        #: the locks that it holds, each as often as it has acquired it
        self.locks = []
        #: raised by one with each wait, so that an earlier deadline does not wake a later wait
        self.epoch = 0
        self.greenlet = greenlet(lambda: self._run(target, args), parent=K.hub)
        process.tasks.append(self)
        K.ready(self)

    def _run(self, target, args):
        try:
            target(*args)
        except GreenletExit:
            pass
        except BaseException as error:
            K.note("traceback\n" + traceback.format_exc())
            K.problem("crash", "%s raised %r" % (self.name, error))
        finally:
            self.over = True
            if self in self.process.tasks:
                self.process.tasks.remove(self)


class Kernel:
    """The scheduler, the clock, the trace and the list of problems of one run."""

    def __init__(self, seed, keep_trace=False):
        global K
        K = self
        self.rng = random.Random(seed)
        self.now, self.steps = BEGIN, 0
        self.hub, self.current = getcurrent(), None
        self.processes = []
        self.trace = []
        #: of ``(when, invariant, text)``
        self.problems = []
        #: a hash of the whole trace, to compare two runs of one seed
        self.digest = 0
        self.keep_trace = keep_trace
        #: seconds at most for which a new thread runs before the one that has started it goes on
        self.head_start = 0.0
        #: how often a task was given control, by name
        self.turns = collections.Counter()
        #: ``(machine, name)`` of a Unix socket: its listening end
        self.socket_names = {}
        #: what the processes have of ``weakref.finalize``, which keeps the function, and all it refers to, until then
        self.finalizers = []
        self._runnable, self._timers = [], []
        self._timer_number, self._numbers = itertools.count(), collections.Counter()
        self.set_preemption(0)

    def set_preemption(self, per_statement):
        """Preempt threads after ``1 / per_statement`` statements on average; 0: never."""
        self._preempts_per_statement = per_statement
        LEFT[0] = self._statements_until_preemption()

    def note(self, text):
        """Write a line of the trace."""
        who = self.current.name if self.current else "-"
        self.digest = hash((self.digest, round(self.now, 9), who, text))
        if self.keep_trace:
            self.trace.append("%10.4f  %-28s %s" % (self.now - BEGIN, who, text))

    def problem(self, invariant, text):
        """Take note that ``invariant`` does not hold."""
        self.note("PROBLEM %s: %s" % (invariant, text))
        self.problems.append((self.now, invariant, text))

    def number(self, what):
        """Return the next number of what is numbered by itself: 1, 2, and so on."""
        self._numbers[what] += 1
        return self._numbers[what]

    # Timers and waiting

    def at(self, when, do):
        """Call ``do()`` at ``when``, outside of all tasks."""
        heapq.heappush(self._timers, (max(when, self.now), next(self._timer_number), do))

    def after(self, seconds, do):
        self.at(self.now + seconds, do)

    def ready(self, task):
        """Let ``task`` run as soon as its turn comes."""
        if not task.queued and not task.over:
            task.queued = True
            (task.process.parked if task.process.stopped else self._runnable).append(task)

    def wake(self, waiters):
        for task in waiters:
            self.ready(task)

    def wait(self, queues, deadline=None):
        """Put the current task to sleep until somebody wakes one of ``queues``, or until ``deadline``.

        The caller has to look again at what it waits for.
        """
        task = self._living_task()
        for queue in queues:
            queue.append(task)
        task.epoch += 1
        epoch = task.epoch
        if deadline is not None:
            self.at(deadline, lambda: task.epoch == epoch and self.ready(task))
        self.hub.switch()
        task.epoch += 1
        for queue in queues:
            if task in queue:
                queue.remove(task)

    def yield_(self, at_most=0.0):
        """Let other tasks run, for ``at_most`` seconds."""
        if self.current is None:
            return
        task = self._living_task()
        if at_most:
            self.at(self.now + self.rng.uniform(0, at_most), lambda: self.ready(task))
        else:
            self.ready(task)
        self.hub.switch()

    def preempt(self):
        """Preempt the current task, unless it is a greenlet of gevent."""
        LEFT[0] = self._statements_until_preemption()
        if self.current is not None and self.current.process.preempts:
            self.yield_(self.rng.choice(_PAUSES))

    def run(self, until):
        """Run all tasks and timers until the clock shows ``until``."""
        began, steps = self.now, self.steps
        while True:
            while self._timers and self._timers[0][0] <= self.now:
                heapq.heappop(self._timers)[2]()
            task = self._next_task()
            if task is not None:
                self._turn(task)
                if self.steps - steps > _MOST_STEPS + _MOST_STEPS_PER_SECOND * (self.now - began):
                    text = "%d steps in %g s, most of them of %s"
                    raise Stuck(text % (self.steps - steps, self.now - began, self.turns.most_common(3)))
            elif self._timers and self._timers[0][0] <= until:
                self.now = max(self.now, self._timers[0][0])
            elif not self._runnable:
                self.now = max(self.now, until)
                return

    def forget(self):
        """Drop all that could keep objects of this run alive."""
        self._timers, self._runnable = [], []
        for finalizer in self.finalizers:
            finalizer.detach()
        LEFT[0] = _NEVER

    def _living_task(self):
        if self.current is None:
            raise Stuck("something waits outside of all tasks")
        if self.current.process.dead:
            raise GreenletExit
        return self.current

    def _statements_until_preemption(self):
        if not self._preempts_per_statement:
            return _NEVER
        return int(self.rng.expovariate(self._preempts_per_statement)) + 1

    def _next_task(self):
        """Return one of those that can run, None if none can."""
        runnable = self._runnable
        if not runnable:
            return None
        index = int(self.rng.random() * len(runnable))
        task, runnable[index] = runnable[index], runnable[-1]
        runnable.pop()
        task.queued = False
        if task.process.stopped:
            task.queued = True
            task.process.parked.append(task)
            return None
        return None if task.over else task

    def _turn(self, task):
        self.steps += 1
        self.turns[task.name] += 1
        self.now += self.rng.random() * 4e-5
        self.current = task
        task.greenlet.switch()
        self.current = None


def point():
    """Stand before each statement of the addon: here a thread may be preempted."""
    LEFT[0] -= 1
    if LEFT[0] <= 0:
        K.preempt()
