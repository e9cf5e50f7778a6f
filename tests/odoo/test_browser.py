"""What users see: somebody writes in Discuss, and it appears in the browser of another."""

from urllib.parse import quote

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support import expected_conditions as shown
from selenium.webdriver.support.ui import WebDriverWait

from stack.browser import Browsers
from stack.builds import find_build
from stack.database import odoo_database
from stack.stack import Stack
from stack.waiting import wait_until
from tests.support.actions import caller, run_code

SERIES = "19.0"
MODULES = "mail"
#: name, login and password of the one with the browser
MEMBER = "Bruno"
#: seconds; the first page of a new database takes longest, for which Odoo puts its style sheets and scripts together
DEADLINE = 120
# Seconds. With the addon a message was there within three, on a busy machine.
ARRIVAL = 30

COMPOSER = (By.CSS_SELECTOR, ".o-mail-Composer-input")
MESSAGES = (By.CSS_SELECTOR, ".o-mail-Thread")

pytestmark = [pytest.mark.rest, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def browsers():
    # Installs what is missing, as the next line does: that takes its time, and here it has no limit.
    with Browsers() as browsers:
        odoo_database(find_build(SERIES), MODULES)
        yield browsers


def wait(driver, condition, deadline, what):
    what = "no %s within %s s at %s" % (what, deadline, driver.current_url)
    return WebDriverWait(driver, deadline, 0.1).until(condition, what)


def new_channel(call):
    """Make a channel of Discuss with a new member; return its id, and that of the member's partner."""
    # A robot would write to the member at a time of its own.
    user = {"name": MEMBER, "login": MEMBER, "password": MEMBER, "odoobot_state": "disabled"}
    (user_id,) = call("res.users", "create", [[user]])
    partner = call("res.users", "read", [[user_id], ["partner_id"]])[0]["partner_id"][0]
    channel = call("discuss.channel", "create", [{"name": "Team", "channel_partner_ids": [(4, partner)]}])
    return channel, partner


def open_channel(stack, driver, channel, partner):
    """Log in; returns when the page shows the channel, and Odoo sends to it what happens there."""
    mark = stack.server.log_mark()
    page = quote("/odoo/discuss?active_id=discuss.channel_%d" % channel, safe="")
    driver.get("%s/web/login?redirect=%s" % (stack.odoo.http_url, page))
    login = wait(driver, shown.visibility_of_element_located((By.NAME, "login")), DEADLINE, "login form")
    login.send_keys(MEMBER)
    driver.find_element(By.NAME, "password").send_keys(MEMBER + Keys.ENTER)
    wait(driver, shown.element_to_be_clickable(COMPOSER), DEADLINE, "place to write")

    def looked():
        # Odoo looks for what is new after each subscription. The last one of a page names whoever it has a picture of:
        # a later one would fetch messages by itself.
        needed = ['"res.partner",%d]' % partner, '"res.partner",%d,"presence"]' % partner]
        lines = stack.server.log_since(mark).splitlines()
        return any('FROM "bus_bus" WHERE' in line and all(part in line for part in needed) for line in lines)

    wait_until(looked, DEADLINE, "the subscription", 0.2, stack.odoo.log_tail)
    stack.wait_for_listen()


def test_a_message_appears_in_the_browser_of_the_other(browsers):
    with Stack(SERIES, modules=MODULES) as stack:
        call, driver = caller(stack.odoo), browsers.open()
        channel, partner = new_channel(call)
        open_channel(stack, driver, channel, partner)
        # It is gone with the page.
        driver.execute_script("window.neverLoadedAgain = true")
        post = "env['discuss.channel'].browse(%d).message_post(body='Lunch at noon?', message_type='comment')"
        run_code(call, post % channel)
        wait(driver, shown.text_to_be_present_in_element(MESSAGES, "Lunch at noon?"), ARRIVAL, "message")
        assert driver.execute_script("return window.neverLoadedAgain")
