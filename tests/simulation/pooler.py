"""A pooler: like PgBouncer in transaction or session mode, or like PgDog before 0.1.52."""

from . import kernel, statements
from .network import TO_CLIENT
from .postgres import Backend

TRANSACTION, SESSION, PGDOG = "transaction", "session", "pgdog"
_CLOSED = "server closed the connection unexpectedly"


class Pooler:
    """One pool of ``size`` server connections for each database.

    ``away``: not running; ``hanging``: accepts, but answers nothing; ``full``: no more clients; ``disabled``:
    databases that it refuses.
    """

    def __init__(self, size, mode=TRANSACTION):
        self.size, self.mode = size, mode
        self.away = self.hanging = self.full = False
        self.disabled, self.clients = set(), []
        self._pools, self._queue = {}, []
        #: for PGDOG: channel -> its one server connection, whatever databases clients listen in
        self._listening = {}

    def connect(self, link, database):
        if self.hanging:
            self._queue.append(lambda: self.connect(link, database))
            return
        problem = self._refusal(link, database)
        if problem:
            link.carry(TO_CLIENT, lambda: link.client.push("refused", problem))
            return
        link.server = _Client(self, link, database)
        self.clients.append(link.server)
        pid = kernel.K.rng.getrandbits(31)
        link.carry(TO_CLIENT, lambda: link.client.push("connected", pid))

    def _refusal(self, link, database):
        if self.away or link.path.refusing:
            return "connection to server failed: Connection refused"
        if self.full or link.path.full:
            return "FATAL:  no more connections allowed (max_client_conn)"
        if database in self.disabled:
            return 'FATAL:  database "%s" is disabled' % database
        return None

    def give(self, client):
        """Give ``client`` a server connection, if one is free; return whether it has one."""
        if client.backend:
            return True
        cluster, pool = kernel.K.world.cluster, self._pools.setdefault(client.database, [])
        if self.hanging or not cluster.up:
            return False
        free = [backend for backend in pool if backend.client is None]
        if not free and (len(pool) < self.size or self.mode == SESSION):
            if cluster.refusal(client.database):
                return False
            backend = Backend(cluster, client.database, is_direct=False)
            backend.client = None
            backend.lost = lambda _reason, _silently: self._lost(backend)
            free = [backend]
            pool.append(backend)
        if not free:
            return False
        client.take(kernel.K.rng.choice(free))
        return True

    def take_back(self, client):
        """Have the server connection of ``client`` again, and serve who waits."""
        backend = client.backend
        if backend:
            client.backend = backend.client = None
            backend.hear = lambda notification: None
            pool = self._pools[client.database]
            if backend in pool and (backend.busy or backend.in_transaction or self.mode == SESSION):
                # PgBouncer closes what it cannot reuse.
                pool.remove(backend)
                backend.close()
        self.serve()

    def serve(self):
        """Try again what had to wait."""
        queue, self._queue = self._queue, []
        for do in queue:
            do()

    def wait(self, do):
        self._queue.append(do)

    def cut(self):
        for client in list(self.clients):
            client.drop()

    def listen(self, client, statement):
        """Do what PgDog does with LISTEN: a channel is known by its name alone, so the first database gets it."""
        match = statements.re.match(r'(UN)?LISTEN\s+"?([^"\s;]+)', statement, statements.re.IGNORECASE)
        stop, channel = match.groups()
        if stop:
            client.channels.discard(channel)
            return
        client.channels.add(channel)
        if channel not in self._listening:
            backend = Backend(kernel.K.world.cluster, client.database, is_direct=False)
            backend.client_name, backend.client = "PgDog", None
            backend.listens.add(channel)
            backend.hear = self._hand_out
            backend.lost = lambda _reason, _silently: self._channel_lost(channel)
            self._listening[channel] = backend

    def _channel_lost(self, channel):
        del self._listening[channel]
        for client in list(self.clients):
            if channel in client.channels:
                client.drop()

    def _hand_out(self, notification):
        for client in self.clients:
            if notification.channel in client.channels:
                client.push("notification", notification)

    def _lost(self, backend):
        for pool in self._pools.values():
            if backend in pool:
                pool.remove(backend)
        if backend.client:
            backend.client.drop()


class _Client:
    """The pooler's end of a client's connection."""

    def __init__(self, pooler, link, database):
        self._pooler, self._link, self.database = pooler, link, database
        self.backend, self.channels, self._gone = None, set(), False

    def take(self, backend):
        self.backend, backend.client = backend, self
        backend.client_name = self._link.client.process_name
        backend.hear = lambda notification: self.push("notification", notification)

    def execute(self, statement, values):
        if self._gone:
            return
        if self._pooler.mode == PGDOG and statements.re.match(r"(UN)?LISTEN\b", statement, statements.re.IGNORECASE):
            # Of several statements it heeds only the first.
            self._pooler.listen(self, statements.split(statement)[0])
            self.push("result", None)
            return
        if self._pooler.hanging or not self._pooler.give(self):
            self._pooler.wait(lambda: self.execute(statement, values))
            return
        backend = self.backend

        def reply(kind, what):
            if self._gone or self.backend is not backend:
                # The client has hung up meanwhile, and the pooler has closed its connection.
                backend.close()
                return
            self.push(kind, what)
            if not backend.in_transaction and self._pooler.mode != SESSION:
                self._pooler.take_back(self)

        backend.execute(statement, values, reply)

    def hang_up(self):
        if not self._gone:
            self._gone = True
            self._pooler.clients.remove(self)
            self._pooler.take_back(self)

    def drop(self):
        self.push("closed", _CLOSED)
        self.hang_up()

    def push(self, kind, what):
        self._link.carry(TO_CLIENT, lambda: self._link.client.push(kind, what))
