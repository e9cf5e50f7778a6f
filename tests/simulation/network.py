"""The ways from clients to the server and the pooler, and what can go wrong on them."""

from . import kernel

# Seconds after which TCP gives up an idle connection (keepalives) and one with something on the way.
IDLE_TIMEOUT, SEND_TIMEOUT = 30.0, 10.0
# Seconds after which a server notices that its client is gone without a word.
_SERVER_NOTICES = 20.0
TO_SERVER, TO_CLIENT = 0, 1


class Path:
    """The way to one address, at which ``target`` accepts connections.

    ``refusing``: nothing answers on the port; ``full``: too many connections; ``swallowing``: packets get lost,
    and TCP sends them again once the path is healed; ``latency``: seconds at most, in each direction.
    """

    def __init__(self, name, target, latency=0.002):
        self.name, self.target = name, target
        self.refusing = self.full = self.swallowing = False
        self.latency = self._normal_latency = latency
        self.links = []

    def swallow(self):
        self.swallowing = True
        for link in self.links:
            link.give_up_after(IDLE_TIMEOUT)

    def heal(self):
        self.refusing = self.full = self.swallowing = False
        self.latency = self._normal_latency
        for link in list(self.links):
            held, link.held = link.held, []
            for direction, deliver in held:
                link.carry(direction, deliver)

    def cut(self, link):
        """Reset a connection: the client notices at once, the server perhaps later."""
        link.client.push("closed", "SSL connection has been closed unexpectedly")
        link.lost = True
        kernel.K.after(kernel.K.rng.choice((0, _SERVER_NOTICES)), link.hang_up)


class Link:
    """One connection on a path. What is sent in one direction arrives in order."""

    def __init__(self, path, client):
        self.path, self.client = path, client
        #: what the client talks to, once it is connected; it has ``execute`` and ``hang_up``
        self.server = None
        #: ``lost``: nothing arrives any more; ``silent``: a middlebox answers keepalives nevertheless
        self.lost = self.silent = self.over = False
        self.held, self._last = [], [0.0, 0.0]
        path.links.append(self)

    def carry(self, direction, deliver):
        """Have ``deliver()`` called on arrival."""
        if self.lost or self.path.swallowing:
            if not self.lost:
                self.held.append((direction, deliver))
            if direction == TO_SERVER:
                self.give_up_after(SEND_TIMEOUT)
            return
        latency = kernel.K.rng.uniform(0.1, 1) * self.path.latency
        self._last[direction] = arrival = max(kernel.K.now + latency, self._last[direction])
        kernel.K.at(arrival, lambda: self._arrive(direction, deliver))

    def give_up_after(self, seconds):
        """Let the client's TCP give up after ``seconds`` if the connection is still dead then."""

        def look():
            if (self.lost or self.path.swallowing) and not self.silent and not self.over:
                self.client.push("closed", "could not receive data from server: Connection timed out")

        kernel.K.after(seconds, look)

    def lose(self, silent):
        """Die without a word; ``silent``: not even keepalives tell."""
        self.lost, self.silent = True, silent
        self.give_up_after(IDLE_TIMEOUT)
        kernel.K.after(_SERVER_NOTICES, self.hang_up)

    def hang_up(self):
        if self.server is not None:
            self.server.hang_up()

    def close(self):
        """The client has closed it."""
        self.over = True
        self.carry(TO_SERVER, self.hang_up)
        kernel.K.after(60, self._forget)

    def _arrive(self, direction, deliver):
        if self.lost:
            return
        if self.path.swallowing:
            self.held.append((direction, deliver))
        else:
            deliver()

    def _forget(self):
        if self in self.path.links:
            self.path.links.remove(self)
