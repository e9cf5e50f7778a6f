"""Faults at random, for as long as you like, with many clients: is anything lost or doubled?

    python -m tools.soak MINUTES [--seed N] [--write FILE]

Messages flow all the time on two Odoo 19.0, prefork, of one machine and with one database, so that their listeners
share one direct connection. The clients are as browsers: who loses the websocket comes back and says what it had last.
The seed decides which faults there are, and for how long; it does not decide how fast the machine is.
"""

import argparse
import contextlib
import datetime
import json
import random
import re
import shutil
import sys
import threading
import time
from pathlib import Path

import psycopg2
import requests

from stack import servers
from stack.archive import CACHE
from stack.clients import Client
from stack.stack import Stack
from stack.waiting import wait_until

from .soak_faults import CRON_WORKERS, FAULTS, FAULTS_OF_SHARING, leader
from .soak_report import Fault, Message, Soak, report

CLIENTS = 50
CHANNELS = 10
PER_SECOND = 28
# Seconds; what lasts longer is got over before the next fault begins.
LONG = 4
# Seconds that the last messages may take to arrive; a check of the listener has time to fail meanwhile.
PATIENCE = 60
LOGS = CACHE / "soak"
ENVIRONMENT = {"IMDISPATCHER_CHECK_INTERVAL": "5", "IMDISPATCHER_DB_CONNECT_TIMEOUT": "2"}


class Sender:
    """Sends steadily, through the pooler."""

    def __init__(self, stack):
        #: message -> :class:`Message`, of those whose COMMIT was confirmed
        self.sent = {}
        self._problem = None
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
        if self._problem or self._stopped.is_set() and self._thread.is_alive():
            raise RuntimeError("the sender has failed") from self._problem

    def _run(self):
        number = 0
        try:
            while not self._stopped.wait(1 / PER_SECOND):
                number += 1
                self._send("message %d" % number, "channel %d" % (number % CHANNELS))
        except Exception as error:
            self._problem = error

    def _send(self, message, channel):
        try:
            self._sender.insert(channel, message)
        except psycopg2.Error:
            # It may be there or not: it does not count.
            self._stopped.wait(0.2)
            return
        self.sent[message] = Message(channel, time.monotonic())
        while True:
            try:
                self._sender.notify(json.dumps([self._sender.channel(channel)]))
            except psycopg2.Error:
                self._stopped.wait(0.2)
            else:
                return


def is_confirmed(stack):
    """Return whether the bus of this Odoo has heard itself."""
    with contextlib.suppress(requests.RequestException):
        return stack.odoo.health(10)["confirmed"]


def faults_in_turn(chance):
    """Yield the names of faults: each once in every round, in an order of the round's own."""
    names = [*FAULTS, *FAULTS_OF_SHARING]
    while True:
        yield from chance.sample(names, len(names))


def wait_until_ready(name, last, stacks, clients, sender):
    """Wait until the fault meets what it is for; ``last`` is the one before."""
    if name in FAULTS_OF_SHARING:
        leader(stacks)
    # Who has not yet found out that it is deaf would be stopped from that, which would be two faults in one.
    if name.endswith(" stopped") or last and last.length > LONG:
        since = time.monotonic()

        def all_hear():
            heard = [client.received[-1].message if client.received else None for client in clients]
            return all(message in sender.sent and sender.sent[message].at > since for message in heard)

        wait_until(all_hear, PATIENCE, "all clients to hear")


def soak(minutes, seed):
    """Run for so many minutes; return the :class:`Soak`. What the Odoos have logged is kept in :data:`LOGS`."""
    chance = random.Random(seed)
    faults, bugs = [], []
    with contextlib.ExitStack() as exits:
        stacks = _start(exits)
        clients = _connect(exits, stacks)
        wait_until(lambda: all(map(is_confirmed, stacks)), 60, "both to listen", 0.1, stacks[0].odoo.log_tail)
        leader(stacks)
        sender = Sender(stacks[0])
        began = time.monotonic()
        try:
            for name in faults_in_turn(chance):
                calm = chance.uniform(0.5, 4)
                if time.monotonic() - began + calm >= 60 * minutes:
                    break
                time.sleep(calm)
                try:
                    wait_until_ready(name, faults[-1] if faults else None, stacks, clients, sender)
                    since = time.monotonic()
                    print("%4d s  %s" % (since - began, name), flush=True)
                    stopped = {**FAULTS, **FAULTS_OF_SHARING}[name](stacks, chance)
                    faults.append(Fault(name, since, time.monotonic(), stopped))
                except TimeoutError as error:
                    # What came of the messages is of interest all the same.
                    bugs.append("%4d s  %s: %s" % (time.monotonic() - began, name, str(error).partition("\n")[0]))
                    print(bugs[-1], flush=True)
                sender.check()
            sender.stop()
            _wait_for_the_last(clients, sender)
        finally:
            for number, stack in enumerate(stacks, 1):
                lines = stack.odoo.log().splitlines()
                bugs += [line for line in lines if re.search(r"bus_alt_connection.*internal error", line)]
                shutil.copy(stack.odoo.log_path, LOGS / ("odoo-%d.log" % number))
    return Soak(began, clients, sender.sent, faults, bugs)


def _start(exits):
    # With each statement in it, the log of the server would be of gigabytes.
    quiet = {"settings": {"log_statement": "none"}}
    conf = {"max_cron_threads": CRON_WORKERS}
    stack = exits.enter_context(Stack("19.0", 2, environment=ENVIRONMENT, proxy=True, conf=conf, server_options=quiet))
    return [stack, exits.enter_context(stack.another())]


def _connect(exits, stacks):
    """Return the channel of each client, by the client; half of them are of each Odoo."""
    sessions = [stack.client(channels=()).session_id for stack in stacks]
    clients = {}
    for number in range(CLIENTS):
        stack = stacks[number % 2]
        client = exits.enter_context(Client(stack.odoo, stack.database, sessions[number % 2], returns=True))
        clients[client] = "channel %d" % (number // 2 % CHANNELS)
        client.subscribe([clients[client]], stack.last_id())
    return clients


def _wait_for_the_last(clients, sender):
    def all_there():
        for client, channel in clients.items():
            received = {one.message for one in client.received}
            if any(one.channel == channel and message not in received for message, one in sender.sent.items()):
                return False
        return True

    with contextlib.suppress(TimeoutError):
        wait_until(all_there, PATIENCE, "the last messages", 0.5)
    # What is doubled comes late.
    time.sleep(3)


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
    arguments = parser.parse_args()
    try:
        servers.check()
    except RuntimeError as error:
        parser.error(str(error))
    LOGS.mkdir(exist_ok=True)
    print("seed %d" % arguments.seed, flush=True)
    found = soak(arguments.minutes, arguments.seed)
    lines, well = report(found)
    print("\n".join(["", *lines, "seed %d" % arguments.seed]))
    if arguments.write:
        command = '``make soak MINUTES=%g ARGS="--seed %d"`` of %s'
        write(arguments.write, command % (arguments.minutes, arguments.seed, datetime.date.today()), lines)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
