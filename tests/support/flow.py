"""Messages that are sent all the time, whatever happens meanwhile."""

import contextlib

from stack.sender import Flow
from stack.waiting import wait_until


@contextlib.contextmanager
def flowing(stack, client, channel, interval=0.01, deadline=10.0):
    """Send messages to ``channel`` during the block; all of them arrive, each once and in order.

    :param deadline: seconds after the block until the last has arrived
    """
    with Flow(stack.sender(), channel, interval) as flow:
        yield
    assert len(flow.sent) > 50 and not flow.refused
    receive_all(stack, client, channel, list(flow.sent), deadline)


def receive_all(stack, client, channel, sent, deadline=10.0):
    """Wait until the client has received what was sent to ``channel``, all of it, each once and in order."""

    def last_is_here():
        if sent[-1] in client.messages:
            return True
        # Core's long poll has a gap of its own, and the last of them may fall into it.
        stack.send(channel, "next")
        return False

    wait_until(last_is_here, deadline, "the last message", 0.5)
    assert [message for message in client.messages if message != "next"] == sent
