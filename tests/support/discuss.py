"""People who talk in Odoo's Discuss, each in a real browser."""

import xmlrpc.client
from urllib.parse import quote

from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support import expected_conditions as shown
from selenium.webdriver.support.ui import WebDriverWait

from stack.database import LOGIN, PASSWORD
from stack.waiting import wait_until

#: seconds; the first page of a new database takes longest, for which Odoo puts its style sheets and scripts together
DEADLINE = 120

SENDER, RECEIVER = "Anna", "Bruno"

_COMPOSER = (By.CSS_SELECTOR, ".o-mail-Composer-input")
_SEND = (By.CSS_SELECTOR, ".o-mail-Composer button[name=send-message]")
_MESSAGES = (By.CSS_SELECTOR, ".o-mail-Thread")


class Channel:
    """A new channel of Discuss, with a user for each name, who has it for login and password.

    :param stack: with the module ``mail``
    """

    def __init__(self, stack, members, name="Team"):
        self.stack = stack
        url = stack.odoo.http_url + "/xmlrpc/2/"
        uid = xmlrpc.client.ServerProxy(url + "common").login(stack.database, LOGIN, PASSWORD)
        objects = xmlrpc.client.ServerProxy(url + "object")

        def call(model, method, *arguments):
            return objects.execute_kw(stack.database, uid, PASSWORD, model, method, arguments)

        # A robot would greet them, and write to one of them at a time of its own.
        users = [
            {"name": member, "login": member, "password": member, "odoobot_state": "disabled"} for member in members
        ]
        ids = call("res.users", "create", users)
        users = call("res.users", "read", ids, ["name", "partner_id"])
        #: id of the partner, by name
        self.partners = {user["name"]: user["partner_id"][0] for user in users}
        self.id = call(
            "discuss.channel",
            "create",
            {"name": name, "channel_partner_ids": [(4, partner) for partner in self.partners.values()]},
        )

    def wait_until_subscribed(self, member, since):
        """Wait until Odoo sends to the browser of ``member`` what happens in the channel, and LISTENs.

        :param since: mark in the log of the server, before the member has opened the page
        """
        # Odoo looks for what is new after each subscription. The last one of a page names whoever it has a picture of:
        # a later one would fetch messages by itself.
        needed = ['"res.partner",%d]' % self.partners[member]]
        needed += ['"res.partner",%d,"presence"]' % partner for partner in self.partners.values()]

        def looked():
            lines = self.stack.server.log_since(since).splitlines()
            return any('FROM "bus_bus" WHERE' in line and all(part in line for part in needed) for line in lines)

        wait_until(looked, DEADLINE, "the subscription of %s" % member, 0.2, self.stack.odoo.log_tail)
        self.stack.wait_for_listen()


class Window:
    """A channel, in the browser of one of its members, who has logged in; returns when the bus is ready for it.

    :param driver: of a new browser
    """

    def __init__(self, driver, channel, member):
        self._driver = driver
        since = channel.stack.server.log_mark()
        page = quote("/odoo/discuss?active_id=discuss.channel_%d" % channel.id, safe="")
        driver.get("%s/web/login?redirect=%s" % (channel.stack.odoo.http_url, page))
        self._wait(shown.visibility_of_element_located((By.NAME, "login")), DEADLINE, "login form").send_keys(member)
        driver.find_element(By.NAME, "password").send_keys(member + Keys.ENTER)
        self._composer()
        channel.wait_until_subscribed(member, since)
        # It is gone with the page.
        driver.execute_script("window.neverLoadedAgain = true")

    def write(self, text):
        """Write a message and press Enter; returns when the place to write is empty again."""
        composer = self._composer()
        composer.send_keys(text)
        # The page has to take notice of what was typed before it empties the place, as it does of people's typing.
        self._wait(shown.element_to_be_clickable(_SEND), DEADLINE, "button to send")
        composer.send_keys(Keys.ENTER)
        self._wait(lambda _: not composer.get_attribute("value"), DEADLINE, "end of sending")

    def wait_for(self, text, deadline):
        """Wait until the message is to be seen.

        :raise selenium.common.TimeoutException: it is not, after ``deadline`` seconds
        """
        self._wait(shown.text_to_be_present_in_element(_MESSAGES, text), deadline, repr(text))

    @property
    def was_reloaded(self):
        return not self._driver.execute_script("return window.neverLoadedAgain")

    def _composer(self):
        return self._wait(shown.element_to_be_clickable(_COMPOSER), DEADLINE, "place to write")

    def _wait(self, condition, deadline, what):
        what = "no %s within %s s at %s" % (what, deadline, self._driver.current_url)
        return WebDriverWait(self._driver, deadline, 0.1).until(condition, what)


def two_windows(stack, browsers):
    """Return the windows of SENDER and RECEIVER, in new browsers."""
    channel = Channel(stack, [SENDER, RECEIVER])
    # The receiver is the first: nothing that happens when a page is opened may bring the message later.
    receiver = Window(browsers.open(), channel, RECEIVER)
    return Window(browsers.open(), channel, SENDER), receiver
