"""The screenshot for the README: the windows of two who talk in Discuss, behind PgBouncer with the addon.

python -m tools.screenshot PICTURE.png
"""

import base64
import contextlib
import sys
from pathlib import Path

from selenium.webdriver.common.by import By

from stack.browser import Browsers
from stack.stack import Stack
from tests.support.discuss import DEADLINE, two_windows


def _side_by_side(driver, pictures):
    """Return pictures (PNG) in one, which a browser puts together."""
    images = ["<img style='border: 1px solid gray' src='%s'>" % _address("image/png", picture) for picture in pictures]
    page = "<div style='display: inline-flex; gap: 10px'>%s</div>" % "".join(images)
    driver.set_window_size(2400, 1200)
    driver.get(_address("text/html", page.encode()))
    return driver.find_element(By.TAG_NAME, "div").screenshot_as_png


def _address(kind, content):
    return "data:%s;base64,%s" % (kind, base64.b64encode(content).decode())


def _take_picture(path):
    with contextlib.ExitStack() as exits:
        stack = exits.enter_context(Stack(modules="mail"))
        browsers = exits.enter_context(Browsers())
        _, sender, receiver = exits.enter_context(two_windows(stack, browsers, width=960, height=640))
        for writer, reader, text in (sender, receiver, "The truck is at gate 3."), (receiver, sender, "On my way."):
            writer.write(text)
            reader.wait_for(text, DEADLINE)
        path.write_bytes(_side_by_side(browsers.open(), [sender.picture(), receiver.picture()]))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    _take_picture(Path(sys.argv[1]))
