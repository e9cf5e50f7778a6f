"""What was missed, asked for in one step."""

from bus_alt_connection import connection
from bus_alt_connection.catchup import Backlog
from stack.postgres import libpq_parameters


class AskedBacklog(Backlog):
    """A backlog that is asked at a time of the test's own, ``now``, and for one database."""

    def __init__(self, server):
        super().__init__(lambda database: connection.connect(libpq_parameters(server, database)))
        self.now = 1000.0

    def missed(self, database, overlap=True):
        """Return the channels that it would give, once it is asked; raise what keeps it from asking."""
        found = []
        self.owe([database], self.now, afresh=overlap)
        failed = self.pay(lambda channels: found.extend(channels) or True, self.now)
        if failed:
            raise failed[database][0]
        return found

    def all_heard(self, snapshot):
        self.heard_up_to(snapshot, self.now)
