"""What users see: two of them talk in Discuss, each in a browser."""

import pytest

from stack.browser import Browsers
from stack.builds import find_build
from stack.database import odoo_database
from stack.stack import Stack
from tests.support.discuss import two_windows

_SERIES = "19.0"
_MODULES = "mail"

# Seconds. With the addon a message was there within three, on a busy machine.
_ARRIVAL = 30

pytestmark = [pytest.mark.rest, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def browsers():
    # Installs what is missing, as the next line does: that takes its time, and here it has no limit.
    with Browsers() as browsers:
        odoo_database(find_build(_SERIES), _MODULES)
        yield browsers


def test_a_message_appears_in_the_browser_of_the_other(browsers):
    with Stack(_SERIES, modules=_MODULES) as stack:
        sender, receiver = two_windows(stack, browsers)
        sender.write("Lunch at noon?")
        receiver.wait_for("Lunch at noon?", _ARRIVAL)
        receiver.write("Make it one.")
        sender.wait_for("Make it one.", _ARRIVAL)
        assert not (sender.was_reloaded or receiver.was_reloaded)
