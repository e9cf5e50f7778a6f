"""Waiting for facts, not for time to pass."""

import time


def wait_until(condition, deadline=10.0, what="", interval=0.02, tail=None):
    """Poll ``condition`` and return its first truthy value.

    :param condition: function without arguments; what it raises is passed on
    :param deadline: seconds after which to give up
    :param what: what is awaited, in words; the error says it
    :param interval: seconds between two looks
    :param tail: function returning text that explains a failure, such as the end of a server's log
    :raise TimeoutError: the deadline has passed
    """
    end = time.monotonic() + deadline
    while True:
        # The clock is read first: after a long stop of this very process the fact gets one more look.
        last = time.monotonic() >= end
        value = condition()
        if value:
            return value
        if last:
            message = "waited %.1f s for %s" % (deadline, what or getattr(condition, "__name__", "a condition"))
            explanation = tail() if tail else ""
            raise TimeoutError(message + ("\n" + explanation if explanation else ""))
        time.sleep(interval)
