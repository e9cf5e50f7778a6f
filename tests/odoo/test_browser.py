"""What users see: two of them talk in Discuss, each in a browser."""

import contextlib

import pytest
from selenium.common import TimeoutException

from stack.browser import Browsers
from stack.builds import find_build
from stack.database import odoo_database
from stack.stack import Stack
from stack.waiting import wait_until
from tests.support.discuss import DEADLINE, two_windows

_SERIES = "19.0"
_MODULES = "mail"

# Seconds. With the addon a message was there within three, on a busy machine.
_ARRIVAL = 30
_ABSENCE = 10

pytestmark = [pytest.mark.rest, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def browsers():
    # Installs what is missing, as the next line does: that takes its time, and here it has no limit.
    with Browsers() as browsers:
        odoo_database(find_build(_SERIES), _MODULES)
        yield browsers


@pytest.fixture
def new_windows(browsers):
    """Return a function that opens the windows of two users; arguments are those of Stack."""
    with contextlib.ExitStack() as exits:

        def new_windows(**arguments):
            stack = exits.enter_context(Stack(_SERIES, modules=_MODULES, **arguments))
            return exits.enter_context(two_windows(stack, browsers))

        yield new_windows


def test_a_message_appears_in_the_browser_of_the_other(new_windows):
    _, sender, receiver = new_windows()
    sender.write("Lunch at noon?")
    receiver.wait_for("Lunch at noon?", _ARRIVAL)
    receiver.write("Make it one.")
    sender.wait_for("Make it one.", _ARRIVAL)
    assert not (sender.was_reloaded or receiver.was_reloaded)


def test_without_the_addon_it_appears_when_the_page_is_reloaded(new_windows):
    channel, sender, receiver = new_windows(addon=None)
    sender.write("Lunch at noon?")
    sender.wait_for("Lunch at noon?", DEADLINE)
    wait_until(lambda: channel.is_stored("Lunch at noon?"), DEADLINE, "the message to be stored")
    with pytest.raises(TimeoutException):
        receiver.wait_for("Lunch at noon?", _ABSENCE)
    assert not receiver.was_reloaded
    receiver.reload()
    receiver.wait_for("Lunch at noon?", DEADLINE)
