"""How long the bus is deaf after a fault, and what becomes of what is sent meanwhile."""

import concurrent.futures
import contextlib
import threading
import time
import traceback

import psycopg2

from stack.odoo import series_number
from stack.waiting import wait_until

from .contenders import new_stack, running
from .figures import spread

HOW = """\
Prefork. Two clients with a channel each. Right after the fault one lone message is sent to the first client, and then a
stream of messages to the second, one each 10 ms for 2 s and each 100 ms later, until one arrives: the seconds are from
the end of the fault (the backend that listens has been told to terminate; the restarted PostgreSQL answers again; the
garbage is committed) to that arrival. The lone message is waited for until 3 s after that (14.0: 55 s after the fault,
since a long poll ends after 50 s); if it is not there, one more is sent to the same client to see whether the lone one
comes along. Contenders that sleep for 50 s are measured at the same time; this addon once these are asleep, on one
stack. "lost": messages of the stream that never arrived within 5 s after the first. A client that was thrown out by
Odoo comes back as a browser does, and is counted as reconnected."""

FAULTS = ("kill", "restart", "garbage")
_SLOW = 80.0
_TIMELINE = (-3.0, 57.0)


def run(quick, tell):
    # This addon gets its faults one after the other on one stack, once all others are asleep.
    series = ["19.0"] if quick else ["19.0", "14.0"]
    others = {"19.0": ["c"] if quick else ["a", "c", "d"], "14.0": ["c"]}
    faults = FAULTS[:1] if quick else FAULTS
    slow = [(one, key, fault) for one in series for key in others[one] for fault in faults]
    slow += [(one, "e", "timeline") for one in series]
    ours = [(one, "e", "all") for one in series]
    tell("starting %d stacks" % len(slow + ours))
    stacks = {name: new_stack(name[1], name[0], statements=True, workers=1) for name in slow + ours}
    with running(stacks), concurrent.futures.ThreadPoolExecutor(len(slow)) as pool:
        trials = {name: _Trial(stacks[name]) for name in slow + ours}
        jobs = {name: pool.submit(_slow_trial, trials[name], name, quick) for name in slow}
        tell("%d stacks have their first fault" % len(slow))
        for name in slow:
            if name[1] != "e":
                trials[name].asleep.wait(_SLOW)
        figures = {one: {} for one in series}
        for name in ours:
            for fault in faults:
                tell("%s, this addon: %s" % (name[0], fault))
                figures[name[0]].setdefault("e", {})[fault] = _summary(
                    lambda name=name, fault=fault: trials[name].repeat(fault, 3 if quick else 10)
                )
        tell("waiting for the others")
        for (one, key, fault), job in jobs.items():
            mine = figures[one].setdefault(key, {})
            if fault != "timeline":
                mine[fault] = _summary(job.result)
            if fault in ("kill", "timeline") and job.exception() is None:
                mine["timeline"] = job.result()[0]["timeline"]
    yield from figures.items()


def _slow_trial(trial, name, quick):
    _, key, fault = name
    try:
        if fault == "timeline":
            return trial.repeat("kill", 1, timeline=True)
        return trial.repeat(fault, 1 if quick else 2, timeline=fault == "kill")
    finally:
        trial.asleep.set()


def _summary(result):
    """Return the figures of the trials that ``result()`` returns, or how that failed."""
    try:
        trials = result()
    except Exception as error:  # it must not cost the figures of the others
        traceback.print_exc()
        return {"failed": "%s: %s" % (type(error).__name__, str(error).split("\n")[0])}
    fates = [trial["lone"] for trial in trials]
    return {
        "seconds": spread([trial["seconds"] for trial in trials]),
        "lone": {fate: fates.count(fate) for fate in sorted(set(fates))},
        "lone_seconds": spread([trial["lone_seconds"] for trial in trials if trial["lone_seconds"] is not None]),
        "lost": sum(trial["lost"] for trial in trials),
        "sent": sum(trial["sent"] for trial in trials),
        "reconnected": sum(trial["reconnected"] for trial in trials),
    }


class _Trial:
    """Faults of one stack, one after the other."""

    def __init__(self, stack):
        #: set when the bus is known to be deaf for long
        self.asleep = threading.Event()
        self._stack = stack
        self._long_poll = series_number(stack.series) < 16

    def repeat(self, fault, times, timeline=False):
        """Return what was found each time; with ``timeline`` the first of them has one."""
        with contextlib.closing(_Watched(self._stack, "lone")) as lone:
            with contextlib.closing(_Watched(self._stack, "stream")) as stream:
                return [self._once(fault, number, lone, stream, timeline and number == 0) for number in range(times)]

    def _once(self, fault, number, lone, stream, timeline):
        stack = self._stack
        lone.prove()
        stream.prove()
        backend = stack.wait_for_listen()
        with _Stream(stack, stream) as flow:
            if timeline:
                flow.start(0.1)
                flow.wait(-_TIMELINE[0])
            self._cause(fault, number, backend)
            fault_over = time.monotonic()
            alone = "lone %s %d" % (fault, number)
            lone.send(alone)
            flow.start(0.1 if timeline else 0.01)
            arrival = self._first_arrival(stream, flow, fault_over)
            if timeline:
                flow.wait(_TIMELINE[1] - (time.monotonic() - fault_over))
        lost = self._lost(stream, flow)
        fate, seconds = self._fate(lone, alone, fault_over)
        result = {
            "seconds": arrival - fault_over,
            "lone": fate,
            "lone_seconds": seconds,
            "lost": lost,
            "sent": len(flow.sent),
            "reconnected": lone.reconnected + stream.reconnected,
        }
        if timeline:
            arrived = stream.arrivals()
            pairs = [(at - fault_over, arrived.get(sent)) for sent, at in flow.sent.items()]
            result["timeline"] = [[round(at, 3), there and round(there - fault_over, 3)] for at, there in pairs]
        lone.reconnected = stream.reconnected = 0
        return result

    def _cause(self, fault, number, backend):
        server = self._stack.server
        if fault == "kill":
            server.execute("SELECT pg_terminate_backend(%s)", (backend,))
        elif fault == "restart":
            server.restart("immediate" if number % 2 else "fast")
        else:
            with contextlib.closing(self._stack.sender()) as sender:
                sender.notify("garbage")

    def _first_arrival(self, stream, flow, since):
        def arrived():
            stream.come_back()
            if time.monotonic() - since > 2:
                flow.slow_down()
                self.asleep.set()
            # Of those sent before some may still be on the way.
            return [at for message, at in stream.arrivals().items() if flow.sent.get(message, 0) >= since]

        return min(wait_until(arrived, _SLOW, "a push after the fault", 0.01, self._stack.odoo.log_tail))

    def _lost(self, stream, flow):
        def all_here():
            stream.come_back()
            return set(flow.sent) <= set(stream.arrivals())

        with contextlib.suppress(TimeoutError):
            wait_until(all_here, 5, interval=0.05)
        return len(set(flow.sent) - set(stream.arrivals()))

    def _fate(self, lone, alone, since):
        deadline = max(3, 55 - (time.monotonic() - since)) if self._long_poll else 3

        def here():
            lone.come_back()
            return lone.arrivals().get(alone)

        with contextlib.suppress(TimeoutError):
            return "arrived by itself", wait_until(here, deadline, interval=0.05) - since
        with contextlib.suppress(TimeoutError):
            lone.send("next")
            wait_until(here, 5, interval=0.05)
            return "arrived only with the next message", None
        return "never arrived", None


class _Watched:
    """A client that comes back if it is thrown out."""

    def __init__(self, stack, channel):
        self.reconnected = 0
        self._stack = stack
        self._channel = channel
        # Odoo takes 0, that of an empty table, for "the last 50 s".
        self.send("proof")
        self._clients = [stack.client([channel], listening=False)]

    def send(self, message):
        """Send it, as soon as the server or the pooler can take it."""

        def taken():
            with contextlib.suppress(psycopg2.Error):
                return self._stack.send(self._channel, message)

        wait_until(taken, 20, "a message to be taken")

    def prove(self):
        """Return when pushes arrive."""
        sent = []

        def one_arrives():
            self.come_back()
            sent.append("proof %f" % time.monotonic())
            self.send(sent[-1])
            with contextlib.suppress(TimeoutError):
                self._clients[-1].wait_for(sent[-1], 0.5)
                return True

        wait_until(one_arrives, _SLOW, "a push", 0.1, self._stack.odoo.log_tail)

    def come_back(self):
        if not self._clients[-1].failures or series_number(self._stack.series) < 16:
            return
        with contextlib.suppress(Exception):  # the server may be away
            known = max((one.id for client in self._clients for one in client.received), default=0)
            self._clients.append(self._stack.client([self._channel], known, listening=False))
            self.reconnected += 1

    def arrivals(self):
        """Return the monotonic second of the first arrival of each message."""
        found = {}
        for client in self._clients:
            for one in list(client.received):
                found.setdefault(one.message, one.at)
        return {message: at for message, at in found.items() if not str(message).startswith("proof")}

    def close(self):
        for client in self._clients:
            client.close()


class _Stream:
    """Numbers that are sent in a thread of its own, whatever happens."""

    _numbers = iter(range(10**9))

    def __init__(self, stack, watched):
        #: number -> monotonic second
        self.sent = {}
        self._sender = stack.sender()
        self._channel = watched._channel
        self._interval = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self, interval):
        self._interval = interval
        if not self._thread.is_alive():
            self._thread.start()

    def slow_down(self):
        self._interval = 0.1

    def wait(self, seconds):
        """Let it flow."""
        if seconds > 0:
            self._done.wait(seconds)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        self._sender.close()

    def _run(self):
        while not self._done.wait(self._interval):
            number = next(self._numbers)
            with contextlib.suppress(psycopg2.Error):  # there may be no server, and then nothing was sent
                self.sent[number] = self._sender.send(self._channel, number).at
