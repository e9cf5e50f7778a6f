"""Who said what to PostgreSQL, and which way: read from the logs of the server and of the pooler.

The logs miss nothing, however short a connection lives.
"""

import re
from typing import NamedTuple

# As stack.postgres has the server write it; the name of a database has no blank, one of an application may.
_STATEMENT = re.compile(r"\[(\d+)\] \S+\((\d+)\) (.*?) (\S+) LOG:  statement: (.*)")
_CONNECTION = re.compile(r"new connection to server \(from \S+:(\d+)\)")
_LISTEN = re.compile(r"(?:^|;)\s*listen\s", re.IGNORECASE)


class Statement(NamedTuple):
    backend: int  # process id
    pooled: bool  # whether it came through the pooler
    application: str  # the pooler leaves that of its last client if the next has none
    database: str
    text: str  # its first line

    @property
    def listens(self):
        return bool(_LISTEN.search(self.text))


def statements(stack, since=0):
    """Return the statements that reached the server after a mark in its log.

    Those that the tests themselves have sent straight to it are left out.
    """
    found = _STATEMENT.findall(stack.server.log_since(since))
    # Afterwards: whatever spoke has connected before.
    pooled = {int(port) for port in _CONNECTION.findall(stack.pooler.log())}
    return [
        Statement(int(backend), int(port) in pooled, application, database, text)
        for backend, port, application, database, text in found
        if application != "tests" or int(port) in pooled
    ]
