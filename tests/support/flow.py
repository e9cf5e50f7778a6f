"""Messages that are sent all the time, whatever happens meanwhile."""

import contextlib
import threading

from stack.waiting import wait_until


@contextlib.contextmanager
def flowing(stack, client, channel, interval=0.01, deadline=10.0):
    """Send messages to ``channel`` during the block; all of them arrive, each once and in order.

    :param deadline: seconds after the block until the last has arrived
    """
    done = threading.Event()
    sent = []

    def send():
        with contextlib.closing(stack.sender()) as sender:
            while not done.wait(interval):
                sender.send(channel, len(sent))
                sent.append(len(sent))

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()

    def all_here():
        if sent[-1] in client.messages:
            return True
        # Core's long poll has a gap of its own, and the last of them may fall into it.
        stack.send(channel, "next")
        return False

    wait_until(all_here, deadline, "the last message", 0.5)
    arrived = [message for message in client.messages if message != "next"]
    assert len(sent) > 50
    assert arrived == sent
