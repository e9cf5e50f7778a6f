"""TLS to PostgreSQL itself, with a certificate that is checked."""

import subprocess

import pytest

from stack.postgres import PASSWORD
from stack.stack import Stack
from tests.support.certificates import make_authority, make_certificate

# The threaded one has nothing of its own here.
pytestmark = pytest.mark.variants("14.0-prefork", "19.0-prefork")


@pytest.fixture(scope="module")
def authorities(tmp_path_factory):
    """The certificates of the authority that the server's is of, and of one that knows nothing of it."""
    folder = tmp_path_factory.mktemp("authorities")
    return {name: make_authority(folder, name) for name in ("ours", "another")}


@pytest.fixture(scope="module")
def stack(variant, authorities, tmp_path_factory):
    """A stack whose PostgreSQL has a certificate for localhost; listeners insist on it."""

    def environment(stack):
        for path in make_certificate(tmp_path_factory.mktemp("server"), authorities["ours"], "localhost"):
            # PostgreSQL does not read a key that others might.
            owner = ["-o", stack.server.run_as] if stack.server.run_as else []
            subprocess.run(["install", "-m", "600", *owner, path, stack.server.data / path.name], check=True)
        stack.server.settings.update(ssl="on", ssl_cert_file="server.crt", ssl_key_file="server.key")
        stack.server.reload()
        return variables(stack, authorities["ours"])

    with Stack(*variant, environment=environment, jobs=False) as stack:
        yield stack


def variables(stack, authority):
    return {
        "IMDISPATCHER_DB_HOST": "localhost",
        "IMDISPATCHER_DB_HOSTADDR": stack.server.host,
        "IMDISPATCHER_DB_PORT": str(stack.server.port),
        "IMDISPATCHER_DB_SSLMODE": "verify-full",
        "IMDISPATCHER_DB_SSLROOTCERT": str(authority[0]),
    }


def test_listeners_take_a_certificate_that_is_right_and_no_other(stack, authorities):
    encrypted = "SELECT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE application_name LIKE 'odoo-list%'"
    with stack.client() as client:
        stack.odoo.wait_for_log(r"listening on .*imbus at localhost:%s " % stack.server.port)
        stack.send("tests", "hello")
        client.wait_for("hello")
        assert {row.ssl for row in stack.server.execute(encrypted)} == {True}

    mark = stack.odoo.run_with(variables(stack, authorities["another"]))
    with stack.client(listening=False) as client:
        refused = "ERROR .*can't listen on database postgres: localhost:%s: (.*)" % stack.server.port
        assert "certificate verify failed" in stack.odoo.wait_for_log(refused, mark)[1]
        stack.odoo.wait_for_log("WARNING .*looking into bus_bus every 5 s", mark)
        stack.send("tests", "polled")
        client.wait_for("polled", 10)
    assert not stack.direct_connections()
    assert PASSWORD not in stack.odoo.log_since(mark)
