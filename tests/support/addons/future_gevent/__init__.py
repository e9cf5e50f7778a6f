"""Several gevent processes on one port, as Odoo has them from 19.2 on with ``--gevent-workers``."""

import socket

from gevent import socket as gevent_socket
from gevent.server import StreamServer
from odoo.service.server import PreforkServer

COUNT = 2

_pids = set()
_spawn, _pop = PreforkServer.long_polling_spawn, PreforkServer.worker_pop


def spawn(self):
    while len(_pids) < COUNT:
        _spawn(self)
        _pids.add(self.long_polling_pid)


def pop(self, pid):
    if pid in _pids:
        _pids.remove(pid)
        # So that another is spawned.
        self.long_polling_pid = None
    _pop(self, pid)


def listener(cls, address, backlog=None, family=socket.AF_INET):
    """Return a socket at a port that others have as well, among which the kernel distributes those who connect."""
    found = gevent_socket.socket(family=family)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    found.bind(address)
    found.listen(backlog or cls.backlog)
    found.setblocking(0)
    return found


def post_load():
    PreforkServer.long_polling_spawn, PreforkServer.worker_pop = spawn, pop
    StreamServer.get_listener = classmethod(listener)
