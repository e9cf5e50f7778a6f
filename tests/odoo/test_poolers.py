"""Behind poolers that are not PgBouncer: what the addon makes of each, with and without a way past it."""

import contextlib

import pytest

from stack.commands import reason
from stack.poolers import Odyssey, Pgpool, PinningOdyssey
from stack.stack import Stack
from stack.waiting import wait_until
from tests.support.addonlog import troubles, wait_for_record, wait_until_confirmed
from tests.support.checking import HEARD, directly_to, odoo_conf, run_check

KEEPS = "OK; but Odoo uses no pooler, or one that keeps LISTEN, so it needs no addon to listen"

pytestmark = pytest.mark.rest

#: seconds until what was missed, or looked for every second, is there
SOON = 10


@pytest.fixture
def start():
    """Return a function that starts Odoo 19.0, threaded, behind a pooler: ``start(pooler, poll, **options)``.

    By default it does not poll: what arrives was pushed, or caught up with.
    """
    with contextlib.ExitStack() as stacks:

        def start(pooler, poll="0", **options):
            try:
                pooler.program()
            except RuntimeError as error:
                pytest.skip(reason(error))
            # pgpool-II 4.3 tells its client after 5 s that the backend is gone. No self-check should come first.
            environment = {"IMDISPATCHER_POLL_INTERVAL": poll, "IMDISPATCHER_CHECK_INTERVAL": "10"}
            return stacks.enter_context(Stack(pooler=pooler, environment=environment, jobs=False, **options))

        yield start


def address(server):
    return "%s:%s" % (server.host, server.port)


def misses_nothing(stack, place):
    """See that the bus listens at ``place``, the server or the pooler, and survives the loss of that connection."""
    client = stack.client(listening=False)
    assert " at %s (" % address(place) in wait_until_confirmed(stack).message
    stack.send("tests", "pushed")
    client.wait_for("pushed")

    mark, server_mark = stack.odoo.log_mark(), stack.server.log_mark()
    # Nobody is told of it, as if that had been while nobody listened.
    with contextlib.closing(stack.sender()) as sender:
        sender.insert("tests", "missed")
    stack.server.execute("SELECT pg_terminate_backend(%s)", (stack.wait_for_listen(),))
    wait_for_record(stack, "lost the listener of database postgres: ", mark)
    assert " at %s (" % address(place) in wait_until_confirmed(stack, mark).message
    client.wait_for("missed", SOON)
    stack.send("tests", "pushed again")
    client.wait_for("pushed again")
    assert client.messages == ["pushed", "missed", "pushed again"]
    assert [one.level for one in troubles(stack, mark)] == ["WARNING"]  # of the loss
    return stack.wait_for_listen(since=server_mark)


def listeners_past_the_pooler(stack):
    """Return the backends that are left to Odoo without its pooler, which is ended for that."""
    stack.pooler.kill()
    return {row.pid for row in stack.server.activity()}


def check(stack, folder, place):
    """Return the last line of what ``check.py`` says if the listeners go to ``place``."""
    return run_check(folder, odoo_conf(stack.pooler), directly_to(place))[1].splitlines()[-1]


@pytest.mark.parametrize(
    ("pooler", "verdict"),
    [(Odyssey, HEARD), (PinningOdyssey, KEEPS), (Pgpool, KEEPS)],
    ids=["Odyssey", "PinningOdyssey", "Pgpool"],
)
def test_with_a_way_past_it_listeners_take_that(start, tmp_path, pooler, verdict):
    stack = start(pooler)
    listener = misses_nothing(stack, stack.server)
    assert check(stack, tmp_path, stack.server) == verdict
    wait_until(lambda: listeners_past_the_pooler(stack) == {listener}, what="all but the listener to go")


@pytest.mark.parametrize("pooler", [PinningOdyssey, Pgpool])
def test_where_it_keeps_listen_listeners_go_through_it(start, tmp_path, pooler):
    stack = start(pooler, direct=False)
    misses_nothing(stack, stack.pooler)
    assert check(stack, tmp_path, stack.pooler) == KEEPS
    wait_until(lambda: listeners_past_the_pooler(stack) == set(), what="all to go")


def test_where_it_does_not_keep_it_that_is_said_and_messages_arrive_late(start, tmp_path):
    stack = start(Odyssey, "1", direct=False)
    client = stack.client(listening=False)
    deaf = "can't listen on database postgres: %s is a pooler that does not keep LISTEN; set "
    wait_for_record(stack, deaf % address(stack.pooler))
    wait_for_record(stack, "nothing listens on database postgres: polling bus_bus every 1 s instead")
    for message in ("one", "two"):
        stack.send("tests", message)
        client.wait_for(message, SOON)
    assert client.messages == ["one", "two"]
    # Told once, and nothing else is wrong; first of all that it was not told where PostgreSQL is.
    assert sorted(one.level for one in troubles(stack)) == ["ERROR", "WARNING", "WARNING"]
    assert check(stack, tmp_path, stack.pooler) == "NOT OK: 1 error(s)"
