"""Faults at random, for as long as you like, with many clients: is anything lost or doubled?

    python -m tools.soak MINUTES [--seed N] [--write FILE] [--logs FOLDER]

Messages flow all the time on two Odoo 19.0, prefork, of one machine and with one database, so that their listeners
share one direct connection. The clients are as browsers: who loses the websocket comes back and says what it had last.
The seed decides which faults there are, and for how long; it does not decide how fast the machine is.
"""

import argparse
import bisect
import collections
import contextlib
import datetime
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import psycopg2
import requests
import websocket

from stack import servers
from stack.stack import Stack
from stack.waiting import wait_until

CLIENTS = 50
CHANNELS = 10
PER_SECOND = 28
#: of each Odoo; with the gevent process they listen
CRON_WORKERS = 2
NO_FAULT = "none yet"
# Odoo closes it when it can't ask the database, or is gone itself, and the client is as slow as it is to come back.
NO_WEBSOCKET = "websocket lost, until the client is back"
STOPPED = "the client's own gevent process stopped"
# Seconds by which a message may be later than the longest fault is long.
ALLOWED = 5
# Seconds; what lasts longer is got over before the next fault begins.
LONG = 4
# Seconds that the last messages may take to arrive; a check of the listener has time to fail meanwhile.
PATIENCE = 60
# Seconds after which a client that has heard nothing yet subscribes again.
REPEAT = 2
ENVIRONMENT = {"IMDISPATCHER_CHECK_INTERVAL": "5", "IMDISPATCHER_DB_CONNECT_TIMEOUT": "2"}


class Message(NamedTuple):
    channel: str
    at: float  # time.monotonic()


class Fault(NamedTuple):
    name: str
    began: float  # time.monotonic()
    ended: float
    odoo: object  # whose gevent process was stopped, None: no one's


class Sample(NamedTuple):
    """What a process takes."""

    at: float  # time.monotonic()
    kind: str
    megabytes: float
    descriptors: int


class Soak(NamedTuple):
    """All that was found out."""

    began: float  # time.monotonic()
    browsers: list
    sent: dict  # message -> Message
    faults: list  # of Fault
    samples: dict  # process id -> list of Sample
    bugs: list  # texts: lines of a log, and what else ought not to be


class Browser:
    """A client that comes back whenever it loses its websocket."""

    def __init__(self, stack, session, channel):
        self.odoo = stack.odoo
        self.channel = channel
        #: message -> monotonic seconds of each time that it was received
        self.received = collections.defaultdict(list)
        #: the message that came last
        self.heard = None
        #: (since, until) in monotonic seconds, of each time without a websocket
        self.away = []
        self._url = "ws%s/websocket?version=%s" % (stack.odoo.event_url[4:], stack.build.websocket_version)
        self._options = {"cookie": "session_id=" + session, "origin": stack.odoo.event_url, "timeout": 10}
        self._last = stack.last_id()
        self._socket = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="browser")
        self._thread.start()

    def stop(self):
        self._stopped.set()
        with contextlib.suppress(OSError, AttributeError):
            self._socket.sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(15)

    def was_away(self, since, until):
        """Return whether there was a time without a websocket between these two."""
        return any(began < until and since < ended for began, ended in self.away)

    def _run(self):
        lost = time.monotonic()
        while not self._stopped.is_set():
            with contextlib.suppress(OSError, websocket.WebSocketException):
                self._connect()
                self.away.append((lost, time.monotonic()))
                with contextlib.suppress(OSError, websocket.WebSocketException):
                    self._receive()
                lost = time.monotonic()
            # Odoo's web client has some pity with the server as well.
            self._stopped.wait(random.uniform(0.5, 1.5))

    def _connect(self):
        self._socket = websocket.create_connection(self._url, **self._options)
        self._subscribe()

    def _subscribe(self):
        subscription = {"channels": [self.channel], "last": self._last}
        self._socket.send(json.dumps({"event_name": "subscribe", "data": subscription}))

    def _receive(self):
        self._socket.settimeout(REPEAT)
        while True:
            try:
                text = self._socket.recv()
            except websocket.WebSocketTimeoutException:
                # Odoo tells nobody that it could not subscribe for want of a database, and leaves the websocket open.
                self._subscribe()
                continue
            # From now on it is subscribed, whatever happens to the database.
            self._socket.settimeout(None)
            if not text:
                return
            for notification in json.loads(text):
                self._last = max(self._last, notification["id"])
                self.heard = notification["message"]["payload"]
                self.received[self.heard].append(time.monotonic())


class Sender:
    """Sends steadily, through the pooler; what the pooler fails to take is sent as soon as it does."""

    def __init__(self, stack):
        #: message -> `Message`
        self.sent = {}
        #: what was wrong with the sender itself
        self.problem = None
        self._stack = stack
        self._sender = stack.sender()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="sender")
        self._thread.start()

    def stop(self):
        self._stopped.set()
        self._thread.join(PATIENCE)
        self.check()
        self._sender.close()

    def check(self):
        """Raise what has gone wrong with the sender itself."""
        if self.problem or self._stopped.is_set() and self._thread.is_alive():
            raise RuntimeError("the sender has failed") from self.problem

    def _run(self):
        number = 0
        try:
            while not self._stopped.wait(1 / PER_SECOND):
                number += 1
                self._send("message %d" % number, "channel %d" % (number % CHANNELS))
        except Exception as error:
            self.problem = error

    def _send(self, message, channel):
        # It may well be there although the pooler or the server died before they could say so.
        while not (self._try(self._sender.insert, channel, message) or self._is_there(message)):
            self._stopped.wait(0.2)
        self.sent[message] = Message(channel, time.monotonic())
        payload = json.dumps([self._sender.channel(channel)])
        while not self._try(self._sender.notify, payload):
            self._stopped.wait(0.2)

    def _try(self, action, *arguments):
        try:
            action(*arguments)
        except psycopg2.Error:
            return False
        return True

    def _is_there(self, message):
        """Return whether the message was committed, as soon as the server can be asked."""

        def ask():
            try:
                (row,) = self._stack.server.execute(
                    "SELECT count(*) AS number FROM bus_bus WHERE message::json->>'payload' = %s",
                    (message,),
                    self._stack.database,
                )
            except psycopg2.Error:
                return None
            return row

        return wait_until(ask, PATIENCE, "the server to answer", 0.2).number > 0


# Faults: each takes the stack and a source of chance, and returns when it is over -------------------------------------


def listener_killed(stack, chance):
    for _ in range(chance.randint(1, 5)):
        stack.server.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'odoo-listener-%'"
        )
        time.sleep(chance.uniform(0, 1))


def server_restarted(stack, chance):
    stack.server.stop(chance.choice(["fast", "immediate"]))
    time.sleep(chance.uniform(0, 4))
    stack.server.start()


def server_crashed(stack, chance):
    stack.server.kill()
    time.sleep(chance.uniform(0, 4))
    stack.server.start()


def pooler_restarted(stack, chance):
    stack.pooler.stop()
    time.sleep(chance.uniform(0, 4))
    stack.pooler.start()


def pooler_paused(stack, chance):
    stack.pooler.pause()
    time.sleep(chance.uniform(1, 5))
    stack.pooler.resume()


def path_swallowed(stack, chance):
    stack.proxy.swallow()
    time.sleep(chance.uniform(1, 12))
    stack.proxy.forward()


def path_cut(stack, chance):
    for _ in range(chance.randint(1, 5)):
        stack.proxy.cut()
        time.sleep(chance.uniform(0, 1))


def path_refused(stack, chance):
    stack.proxy.refuse()
    stack.proxy.cut()
    time.sleep(chance.uniform(1, 10))
    stack.proxy.forward()


def path_swallowed_and_pooler_restarted(stack, chance):
    stack.proxy.swallow()
    time.sleep(chance.uniform(0, 4))
    pooler_restarted(stack, chance)
    stack.proxy.forward()


def garbage_sent(stack, chance):
    with contextlib.closing(stack.sender()) as sender:
        for _ in range(chance.randint(10, 100)):
            letters = [chance.choice("[]{}\",:0e\\u \t'é") for _ in range(chance.randint(0, 200))]
            sender.notify("".join(letters))
            sender.notify(json.dumps(chance.choice([None, {}, [None], [[["x"]]], [{"a": 1}], [[0.5]], "x", 1e308])))


# Those of sharing take the stacks of both Odoos, and begin when all listen through one process. Those that stop the
# gevent process of an Odoo return that.


def leader_killed(stacks, chance):
    _replace(stacks, leader(stacks), signal.SIGKILL)


def leader_stopped(stacks, chance):
    return _stop(stacks, leader(stacks), chance.uniform(1, 12))


def follower_stopped(stacks, chance):
    followers = sorted(set(listening_processes(stacks)) - {leader(stacks)})
    return _stop(stacks, chance.choice(followers), chance.uniform(1, 12))


def gevent_process_ended(stacks, chance):
    _replace(stacks, chance.choice(stacks).odoo.processes().gevent, signal.SIGTERM)


def cron_worker_ended(stacks, chance):
    _replace(stacks, chance.choice(chance.choice(stacks).odoo.processes().cron), signal.SIGTERM)


def garbage_on_sharing_socket(stacks, chance):
    (name,) = _sockets(leader(stacks))
    with contextlib.ExitStack() as exits:
        for _ in range(chance.randint(10, 100)):
            follower = exits.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            # Whatever the leader makes of it, up to being let go. It may have its hands full with us.
            with contextlib.suppress(OSError):
                follower.settimeout(1)
                follower.connect("\0" + name[1:])
                for _ in range(chance.randint(0, 3)):
                    follower.send(_garbage(chance))
        # Those that were not let go say nothing and read nothing.
        time.sleep(chance.uniform(0, 4))


def _garbage(chance):
    letters = "".join(chance.choice("[]{}\",:0e\\u \t'é") for _ in range(chance.randint(0, 200))).encode()
    contents = [None, {}, [None], [["imbus"]], ["x" * 64], [""], ["\0"], ["\ud800"], "x", 1e308, ["imbus"]]
    content = json.dumps(chance.choice(contents)).encode()
    return chance.choice([letters, content, chance.randbytes(1000), b"[" * 100000, b""])


def _stop(stacks, pid, seconds):
    odoo = listening_processes(stacks)[pid]
    with_clients = pid == odoo.processes().gevent
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        os.kill(pid, signal.SIGCONT)
    return odoo if with_clients else None


def _replace(stacks, pid, signal_number):
    """End one of the processes that listen; return when Odoo has another one in its place, which answers."""
    odoo = listening_processes(stacks)[pid]
    os.kill(pid, signal_number)

    def replaced():
        processes = odoo.processes()
        listening = {*processes.cron, processes.gevent} - {None, pid}
        return len(listening) == CRON_WORKERS + 1 and odoo.is_up()

    wait_until(replaced, PATIENCE, "Odoo to replace a process", 0.2, odoo.log_tail)


FAULTS = [
    listener_killed,
    server_restarted,
    server_crashed,
    pooler_restarted,
    pooler_paused,
    path_swallowed,
    path_cut,
    path_refused,
    path_swallowed_and_pooler_restarted,
    garbage_sent,
]
FAULTS_OF_SHARING = [
    leader_killed,
    leader_stopped,
    follower_stopped,
    gevent_process_ended,
    cron_worker_ended,
    garbage_on_sharing_socket,
]
FAULTS_THAT_STOP = [leader_stopped, follower_stopped]

# Processes ------------------------------------------------------------------------------------------------------------

#: what the names of the sockets begin with, by which listeners share
SOCKETS = "@bus_alt_connection/"


def listening_processes(stacks):
    """Return the Odoo of each process that listens, by its id."""
    found = {}
    for stack in stacks:
        processes = stack.odoo.processes()
        found.update(dict.fromkeys(filter(None, [*processes.cron, processes.gevent]), stack.odoo))
    return found


def _sockets(pid):
    """Return the names of the sockets at which a process is a leader."""
    return {one.laddr for one in psutil.Process(pid).net_connections("unix") if one.laddr.startswith(SOCKETS)}


def _connects(pid, port):
    return any(one.raddr and one.raddr.port == port for one in psutil.Process(pid).net_connections("tcp"))


def leader(stacks):
    """Return the id of the process that all listen through, as soon as there is but one."""

    def find():
        # The server won't do as a witness: it does not know that a connection on a dead path was given up.
        with contextlib.suppress(psutil.NoSuchProcess):
            found = [pid for pid in listening_processes(stacks) if _connects(pid, stacks[0].proxy.port)]
            return found[0] if len(found) == 1 and _sockets(found[0]) else None

    return wait_until(find, PATIENCE, "one direct connection for all", 0.1, stacks[0].odoo.log_tail)


def is_confirmed(stack):
    """Return whether the bus of this Odoo has heard itself."""
    with contextlib.suppress(requests.RequestException):
        return stack.odoo.health(10)["confirmed"]


def sample(stacks, samples):
    """Take note of what the processes that listen take now."""
    for number, stack in enumerate(stacks, 1):
        with contextlib.suppress(psutil.NoSuchProcess):
            processes = stack.odoo.processes()
            for pid in filter(None, [processes.gevent, *processes.cron]):
                kind = "%s of Odoo %d" % ("gevent" if pid == processes.gevent else "cron", number)
                process = psutil.Process(pid)
                memory = process.memory_full_info().uss / 2**20
                samples[pid].append(Sample(time.monotonic(), kind, memory, process.num_fds()))


# The whole ------------------------------------------------------------------------------------------------------------


def faults_in_turn(chance):
    """Yield faults: each kind once in every round, in an order of the round's own."""
    faults = FAULTS + FAULTS_OF_SHARING
    while True:
        yield from chance.sample(faults, len(faults))


def wait_until_ready(fault, last, stacks, browsers, sender):
    """Wait until the fault meets what it is for; ``last`` is the one before."""
    if fault in FAULTS_OF_SHARING:
        leader(stacks)
    # Who has not yet found out that it is deaf would be stopped from that, which would be two faults in one.
    if fault in FAULTS_THAT_STOP or last and last.ended - last.began > LONG:
        since = time.monotonic()

        def all_hear():
            heard = [sender.sent.get(browser.heard) for browser in browsers]
            return all(message and message.at > since for message in heard)

        wait_until(all_hear, PATIENCE, "all clients to hear")


def soak(minutes, seed, say, logs=None):
    """Run for so many minutes; return the `Soak`.

    :param logs: folder for copies of the logs of both Odoos
    """
    chance = random.Random(seed)
    faults, samples, bugs = [], collections.defaultdict(list), []
    # With each statement in it, the log of the server would be of gigabytes.
    quiet = {"settings": {"log_statement": "none"}}
    conf = {"max_cron_threads": CRON_WORKERS}
    with contextlib.ExitStack() as exits:
        stack = exits.enter_context(
            Stack("19.0", 2, environment=ENVIRONMENT, proxy=True, conf=conf, server_options=quiet)
        )
        stacks = [stack, exits.enter_context(stack.another())]
        sessions = [one.client(channels=())._session_id for one in stacks]
        browsers = [
            Browser(stacks[number % 2], sessions[number % 2], "channel %d" % (number // 2 % CHANNELS))
            for number in range(CLIENTS)
        ]
        wait_until(lambda: all(browser.away for browser in browsers), 60, "all browsers to connect")
        wait_until(lambda: all(map(is_confirmed, stacks)), 60, "both to listen", 0.1, stack.odoo.log_tail)
        leader(stacks)
        sender = Sender(stack)

        began = time.monotonic()
        try:
            for fault in faults_in_turn(chance):
                calm = chance.uniform(0.5, 4)
                if time.monotonic() - began + calm >= 60 * minutes:
                    break
                time.sleep(calm)
                sample(stacks, samples)
                name = fault.__name__.replace("_", " ")
                try:
                    wait_until_ready(fault, faults[-1] if faults else None, stacks, browsers, sender)
                    since = time.monotonic()
                    say("%4d s  %s" % (since - began, name))
                    odoo = fault(stacks if fault in FAULTS_OF_SHARING else stack, chance)
                    faults.append(Fault(name, since, time.monotonic(), odoo))
                except TimeoutError as error:
                    # What came of the messages is of interest all the same.
                    bugs.append("%4d s  %s: %s" % (time.monotonic() - began, name, str(error).partition("\n")[0]))
                    say(bugs[-1])
                sender.check()
            sender.stop()
            expected = collections.defaultdict(set)
            for message, sent in sender.sent.items():
                expected[sent.channel].add(message)

            def all_there():
                return all(expected[browser.channel] <= browser.received.keys() for browser in browsers)

            with contextlib.suppress(TimeoutError):
                wait_until(all_there, PATIENCE, "the last messages", 0.5)
            # What is doubled comes late.
            time.sleep(3)
            sample(stacks, samples)
            for browser in browsers:
                browser.stop()
        finally:
            for number, one in enumerate(stacks, 1):
                lines = one.odoo.log().splitlines()
                bugs += [line for line in lines if re.search(r"bus_alt_connection.*internal error", line)]
                if logs:
                    shutil.copy(one.odoo.log_path, Path(logs) / ("odoo-%d.log" % number))
    return Soak(began, browsers, sender.sent, faults, samples, bugs)


def report(found, say):
    """Say what became of the messages; return whether all is well."""
    lost = doubled = once = 0
    gaps = collections.defaultdict(float)
    deliveries = collections.Counter()
    longest = collections.defaultdict(float)
    for fault in found.faults:
        for name in [fault.name] + [STOPPED] * bool(fault.odoo):
            longest[name] = max(longest[name], fault.ended - fault.began)
    allowed = max(longest.values(), default=0) + ALLOWED
    begins = [fault.began for fault in found.faults]

    def fault_between(sent, received):
        """Return the longest fault there was meanwhile, or the last one before; None: there was none yet."""
        last = bisect.bisect_left(begins, received) - 1
        first = last
        while first > 0 and found.faults[first - 1].ended > sent:
            first -= 1
        return max(found.faults[max(first, 0) : last + 1], key=lambda one: one.ended - one.began, default=None)

    wrong = []
    for number, browser in enumerate(found.browsers):
        longest[NO_WEBSOCKET] = max([longest[NO_WEBSOCKET], *(until - since for since, until in browser.away[1:])])
        for message, (channel, at) in found.sent.items():
            if channel != browser.channel:
                continue
            times = browser.received.get(message, [])
            once += len(times) == 1
            lost += not times
            doubled += len(times) > 1
            if times:
                one = fault_between(at, times[0])
                fault = one.name if one else NO_FAULT
                if browser.was_away(at, times[0]):
                    fault = NO_WEBSOCKET
                elif one and one.odoo is browser.odoo and at < one.ended:
                    fault = STOPPED
                deliveries[fault] += 1
                gaps[fault] = max(gaps[fault], times[0] - at)
            if len(times) != 1 or times[0] - at > allowed:
                came = ", ".join("%.2f s" % (one - found.began) for one in times) or "never"
                wrong.append("client %d: %s, sent at %.2f s, came: %s" % (number, message, at - found.began, came))
    times = collections.Counter(fault.name for fault in found.faults)
    times[STOPPED] = sum(fault.odoo is not None for fault in found.faults)
    times[NO_WEBSOCKET] = sum(len(browser.away) - 1 for browser in found.browsers)
    heads = "fault, or the last before", "times", "longest fault", "deliveries", "longest gap"
    say("%-40s %5s %13s %11s %13s" % heads)
    for fault in [NO_FAULT, *sorted(times)]:
        length = "%.2f s" % longest[fault] if longest[fault] else ""
        say("%-40s %5s %13s %11d %11.2f s" % (fault, times[fault] or "", length, deliveries[fault], gaps[fault]))
    say("")
    say("%-18s %9s %22s %22s" % ("longest lived", "after", "MB, begin and end", "descriptors"))
    for kind in sorted({samples[0].kind for samples in found.samples.values()}):
        lives = [samples for samples in found.samples.values() if samples[0].kind == kind]
        first, *_, last = max(lives, key=lambda samples: samples[-1].at - samples[0].at) * 2
        row = kind, last.at - first.at, first.megabytes, last.megabytes, first.descriptors, last.descriptors
        say("%-18s %7d s %15.1f %6.1f %15d %6d" % row)
    say("")
    say("%d messages sent, for %d clients" % (len(found.sent), len(found.browsers)))
    say("delivered once %d, lost %d, doubled %d" % (once, lost, doubled))
    gap = max(gaps.values(), default=0)
    say("longest gap %.2f s, longest fault %.2f s" % (gap, allowed - ALLOWED))
    for line in wrong[:100] + found.bugs:
        say(line)
    return once and not (lost or doubled or found.bugs) and gap <= allowed


def write(path, command, lines):
    """Put what was found out into a text, in place of the literal block at its end."""
    text = Path(path).read_text(encoding="utf-8")
    text = re.sub(r"(?s)::\n\n    .*\Z", "::\n\n", text)
    text = re.sub(r"``make soak MINUTES=\S+ ARGS=[^`]*`` of \S+?(?=,)", lambda _: command, text)
    text += "".join("    %s\n" % line if line else "\n" for line in lines)
    Path(path).write_text(text, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("minutes", type=float)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--write", metavar="FILE", help="put the result at the end of this text, docs/soak.rst")
    parser.add_argument("--logs", metavar="FOLDER", help="keep the logs of both Odoos there")
    arguments = parser.parse_args()
    try:
        servers.check()
    except RuntimeError as error:
        parser.error(str(error))

    def say(text):
        print(text, flush=True)

    if arguments.logs:
        # Not after an hour, if that can't be.
        Path(arguments.logs).mkdir(parents=True, exist_ok=True)
    lines = []
    say("seed %d" % arguments.seed)
    found = soak(arguments.minutes, arguments.seed, say, arguments.logs)
    say("")
    well = report(found, lines.append)
    say("\n".join(lines))
    say("seed %d" % arguments.seed)
    if arguments.write:
        command = '``make soak MINUTES=%g ARGS="--seed %d"`` of %s'
        write(arguments.write, command % (arguments.minutes, arguments.seed, datetime.date.today()), lines)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
