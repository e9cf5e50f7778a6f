"""The faults of a soak: functions of the stacks of both Odoos and a source of chance, which return when it is over.

PostgreSQL, PgBouncer and the direct path are the same for both, so that the first stack stands for both there.
"""

import contextlib
import os
import signal
import time

import psutil

from stack.waiting import wait_until
from tests.support.machine import sharing_socket

#: of each Odoo; with the gevent process they listen
CRON_WORKERS = 2
# Seconds for all to listen through one process again, or for Odoo to replace one.
_DEADLINE = 60


def _away(begin, end, longest, shortest=0.0):
    def fault(stacks, chance):
        begin(stacks[0])
        time.sleep(chance.uniform(shortest, longest))
        end(stacks[0])

    return fault


def _repeated(act):
    def fault(stacks, chance):
        for _ in range(chance.randint(1, 5)):
            act(stacks[0])
            time.sleep(chance.uniform(0, 1))

    return fault


def _kill_listeners(stack):
    stack.server.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'odoo-listener-%'"
    )


def _refuse(stack):
    stack.proxy.refuse()
    stack.proxy.cut()


FAULTS = {
    "listener killed": _repeated(_kill_listeners),
    "server restarted": _away(lambda stack: stack.server.stop(), lambda stack: stack.server.start(), 4),
    "server crashed": _away(lambda stack: stack.server.kill(), lambda stack: stack.server.start(), 4),
    "pooler restarted": _away(lambda stack: stack.pooler.stop(), lambda stack: stack.pooler.start(), 4),
    "pooler paused": _away(lambda stack: stack.pooler.admin("PAUSE"), lambda stack: stack.pooler.admin("RESUME"), 5, 1),
    "path swallowed": _away(lambda stack: stack.proxy.swallow(), lambda stack: stack.proxy.forward(), 12, 1),
    "path cut": _repeated(lambda stack: stack.proxy.cut()),
    "path refused": _away(_refuse, lambda stack: stack.proxy.forward(), 10, 1),
}


# Faults of the processes that listen ----------------------------------------------------------------------------------


def listening_processes(stacks):
    """Return the Odoo of each process that listens, by its id."""
    found = {}
    for stack in stacks:
        processes = stack.odoo.processes()
        found.update(dict.fromkeys(filter(None, [*processes.cron, processes.gevent]), stack.odoo))
    return found


def leader(stacks):
    """Return the id of the process that all listen through, as soon as there is but one."""
    port = stacks[0].proxy.port

    def is_connected(pid):
        # The server won't do as a witness: it does not know that a connection on a dead path was given up.
        return any(one.raddr and one.raddr.port == port for one in psutil.Process(pid).net_connections("tcp"))

    def find():
        with contextlib.suppress(psutil.NoSuchProcess):
            found = list(filter(is_connected, listening_processes(stacks)))
            return found[0] if len(found) == 1 and sharing_socket(found[0]) else None

    return wait_until(find, _DEADLINE, "one direct connection for all", 0.1, stacks[0].odoo.log_tail)


def _follower(stacks, chance):
    return chance.choice(sorted(set(listening_processes(stacks)) - {leader(stacks)}))


def _end(stacks, pid, signal_number):
    """End one of the processes that listen; return when Odoo has another one in its place, which answers."""
    odoo = listening_processes(stacks)[pid]
    os.kill(pid, signal_number)

    def replaced():
        processes = odoo.processes()
        listening = {*processes.cron, processes.gevent} - {None, pid}
        return len(listening) == CRON_WORKERS + 1 and odoo.is_up()

    wait_until(replaced, _DEADLINE, "Odoo to replace a process", 0.2, odoo.log_tail)


def _stop(pid, chance):
    """Have a process stand still for a while."""
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(chance.uniform(1, 12))
    finally:
        os.kill(pid, signal.SIGCONT)


#: They begin when all listen through one process.
FAULTS_OF_PROCESSES = {
    "leader killed": lambda stacks, chance: _end(stacks, leader(stacks), signal.SIGKILL),
    "leader ended": lambda stacks, chance: _end(stacks, leader(stacks), signal.SIGTERM),
    "leader stopped": lambda stacks, chance: _stop(leader(stacks), chance),
    "follower ended": lambda stacks, chance: _end(stacks, _follower(stacks, chance), signal.SIGTERM),
    "follower stopped": lambda stacks, chance: _stop(_follower(stacks, chance), chance),
}
