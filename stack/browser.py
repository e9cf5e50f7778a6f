"""Real browsers without a screen: Chromium, driven through ChromeDriver."""

import contextlib
import os
import shutil
import tempfile
from unittest import mock

from selenium import webdriver

from . import guard
from .system import ensure_packages

# Debian's Chromium depends on no font, and without one there is no text to be seen.
_PACKAGES = ("chromium", "chromium-driver", "fonts-liberation")

# root has no sandbox, and our own pages need none. The rest keeps it from calling home, or anybody else.
_ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-proxy-server",
    "--lang=en-US",
    "--window-size=1000,700",
)


class Browsers(contextlib.ExitStack):
    """Opens browsers, and closes them at the end of its context.

    :raise RuntimeError: they can't be installed
    """

    def __init__(self):
        super().__init__()
        if shutil.which("chromedriver") is None:
            ensure_packages(*_PACKAGES)

    def open(self):
        """Return the selenium driver of a new browser, which nobody has logged in with."""
        folder = self.enter_context(tempfile.TemporaryDirectory(prefix="bus_alt_connection-browser-"))
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or shutil.which("google-chrome")
        for argument in _ARGUMENTS:
            options.add_argument(argument)
        # The profile, and all else that a browser leaves.
        elsewhere = {"HOME": folder, "XDG_CONFIG_HOME": folder, "TMPDIR": folder}
        service = webdriver.ChromeService(
            shutil.which("chromedriver"), env={**os.environ, **elsewhere}, popen_kw={"start_new_session": True}
        )
        # Selenium must not ask a proxy of the environment for the way to ChromeDriver.
        with mock.patch.dict(os.environ, {"no_proxy": "localhost,127.0.0.1"}):
            driver = webdriver.Chrome(options, service)
        self.callback(driver.quit)
        guard.watch(service.process.pid)
        self.callback(guard.forget, service.process.pid)
        return driver
