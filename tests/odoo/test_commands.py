"""Odoo's other ways to run, beside a server with the same database: ``shell``, one start only, and Odoo's own tests."""

import re
import subprocess

import pytest

from stack.odoo import Odoo
from stack.stack import ADDON, Stack
from tests.support.addonlog import troubles, wait_until_confirmed
from tests.support.machine import Machine

SHELL_SCRIPT = """
from odoo.addons.bus_alt_connection import patch
print("rows of bus.bus: %d" % env["bus.bus"].search_count([]))
print("listeners: %d" % len(patch.supervisors()))
"""
# It waits for a notification, which it gets only from a direct connection.
TEST = "/bus:NotifyTests.test_postcommit"


pytestmark = [pytest.mark.rest, pytest.mark.variants("19.0-prefork")]


@pytest.fixture(scope="module")
def stack(variant):
    with Stack(*variant, jobs=False, environment={"IMDISPATCHER_CHECK_INTERVAL": "3"}) as stack:
        yield stack


@pytest.fixture
def run(stack):
    """Return a function that runs an Odoo with other arguments and returns its exit code and all that it wrote."""
    odoos = []

    def run(*options, command=(), script="", addon=ADDON):
        odoo = Odoo(
            stack.build,
            stack.pooler,
            stack.database,
            addon=addon,
            environment=stack.odoo.variables,
            conf={"data_dir": stack.odoo.folder / "data"},
            options=options,
        )
        odoos.append(odoo)
        odoo.prepare()
        program, arguments = odoo.command()[: len(stack.build.command)], odoo.command()[len(stack.build.command) :]
        done = subprocess.run(
            [str(part) for part in (*program, *command, *arguments)],
            env=odoo.environment(),
            cwd=odoo.folder,
            input=script,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=200,
        )
        return done.returncode, done.stdout

    yield run
    for odoo in odoos:
        odoo.close()


@pytest.fixture
def server(stack):
    """The server, with a client; whatever runs beside it, the server serves it as before and has nothing to say."""
    with stack.client(["commands"]) as client:
        wait_until_confirmed(stack)
        leader = Machine(stack).settle()
        mark = stack.odoo.log_mark()
        yield
        assert Machine(stack).settle() == leader
        assert stack.odoo.health()["status"] == "pass"
        stack.send("commands", "after")
        client.wait_for("after")
        assert troubles(stack, mark) == []


def check_log(output):
    """Check that the addon has said where cursors go, and nothing that an operator has to look at."""
    said = re.findall(r"^\S+ \S+ \d+ ([A-Z]+) \S+ odoo\.addons\.bus_alt_connection\.(.*)", output, re.MULTILINE)
    assert said, output
    assert any(text.startswith("patch: listeners go to ") for _level, text in said)
    assert {level for level, _text in said} == {"INFO"}, said
    assert "Traceback" not in output


def test_a_shell_has_no_listener(server, run):
    code, output = run("--no-http", "--shell-interface=python", command=["shell"], script=SHELL_SCRIPT)
    assert code == 0, output
    assert re.search(r"^rows of bus\.bus: \d+$", output, re.MULTILINE)
    assert "\nlisteners: 0\n" in output
    check_log(output)
    assert "listening on" not in output


def test_odoos_own_tests_hear_notifications(stack, server, run):
    # This test of Odoo's wants to hear no messages but its own, while a new listener is also told those of the last
    # minute.
    stack.server.execute("DELETE FROM bus_bus", dbname=stack.database)
    code, output = run("--update=bus", "--test-tags", TEST, "--stop-after-init")
    assert code == 0, output
    assert "0 failed, 0 error(s) of 1 tests" in output
    check_log(output)
