"""Real browsers without a screen: Chromium, driven through ChromeDriver."""

import os
import shutil
import tempfile

import requests
from selenium import webdriver
from selenium.webdriver.common.proxy import Proxy, ProxyType
from selenium.webdriver.remote.client_config import ClientConfig

from . import ports
from .odoo import http_session
from .process import Process
from .system import ensure_packages

# Debian's Chromium depends on no font, and without one there is no text to be seen.
_PACKAGES = ("chromium", "chromium-driver", "fonts-liberation")
_CHROMIUMS = ("chromium", "google-chrome")
_OR = " or ".join(_CHROMIUMS)

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
)


class Browsers(Process):
    """A ChromeDriver and the browsers that it has started; they end with it."""

    name = "chromedriver"

    def __init__(self):
        self._chromium, self._chromedriver = _programs()
        super().__init__()
        self.port = ports.take_port()

    def command(self):
        return [self._chromedriver, "--port=%s" % self.port]

    def environment(self):
        # Where it leaves what does not belong to a profile.
        return {**os.environ, "HOME": str(self.folder), "XDG_CONFIG_HOME": str(self.folder), "TMPDIR": str(self.folder)}

    def is_up(self):
        with http_session() as session:
            try:
                return session.get(self._url + "/status", timeout=10).json()["value"]["ready"]
            except requests.RequestException:
                return False

    def open(self, width=1000, height=700):
        """Return the selenium driver of a new browser, which nobody has logged in with.

        :param width: of its window, as ``height``, in pixels
        """
        options = webdriver.ChromeOptions()
        options.binary_location = self._chromium
        for argument in _ARGUMENTS:
            options.add_argument(argument)
        options.add_argument("--window-size=%d,%d" % (width, height))
        options.add_argument("--user-data-dir=" + tempfile.mkdtemp(prefix="profile-", dir=self.folder))
        # Selenium must not ask a proxy of the environment for it, nor wait forever.
        direct = ClientConfig(self._url, proxy=Proxy({"proxyType": ProxyType.DIRECT}), timeout=300)
        return webdriver.Remote(self._url, options=options, client_config=direct)

    def close(self):
        super().close()
        ports.release_port(self.port)

    @property
    def _url(self):
        return "http://127.0.0.1:%s" % self.port


def _programs():
    """Return the paths of Chromium and of ChromeDriver, installing both if one is missing.

    :raise RuntimeError: they can't be installed
    """
    if not all(_find_programs()):
        try:
            ensure_packages(*_PACKAGES)
        except RuntimeError as error:
            # Ubuntu, for one, does not have them as packages.
            raise RuntimeError("%s\nOr put %s and a chromedriver of its version on PATH" % (error, _OR)) from None
    chromium, chromedriver = _find_programs()
    if not (chromium and chromedriver):
        raise RuntimeError("not on PATH, though installed: chromedriver, and " + _OR)
    return chromium, chromedriver


def _find_programs():
    return next(filter(None, map(shutil.which, _CHROMIUMS)), None), shutil.which("chromedriver")
