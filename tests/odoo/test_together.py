"""Other well-known server-wide addons that touch the same places, loaded before ours or after it: all of them work.

``queue_job`` listens by itself and changes how Odoo's servers start and stop, ``session_db`` opens cursors by the
address of another database, and ``sentry`` wraps requests, threads and log.
"""

import gzip
import http.server
import json
import re
import threading

import pytest

from stack.odoo import LOGIN, default_load, series_number
from stack.others import with_others
from stack.postgres import PASSWORD, USER
from stack.stack import Stack
from stack.waiting import wait_until
from tests.support import addonlog, traffic

#: That of 14.0 wants a Werkzeug that has sessions of its own, which the Odoo of Debian does without.
OTHERS = {"14.0": ("queue_job", "sentry"), "19.0": ("queue_job", "session_db", "sentry")}
SESSIONS = "sessions"
_TROUBLE = re.compile(r"^.* (?:ERROR|CRITICAL) .*|^.*Traceback.*", re.MULTILINE)

pytestmark = [pytest.mark.rest, pytest.mark.variants("19.0-prefork", "14.0-threaded")]


@pytest.fixture(scope="module")
def sentry():
    """What sentry gets to know: a list of texts, one for each request, and its address as ``url``."""
    with _Sentry(("127.0.0.1", 0), _SentryHandler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module", params=["ours first", "ours last"])
def stack(request, variant, sentry):
    series, workers = variant
    addons = [*OTHERS[series], "bus_alt_connection"]
    if request.param == "ours first":
        addons.reverse()
    stack = Stack(
        series,
        workers,
        modules="bus,queue_job",
        load=",".join([default_load(series), *addons]),
        environment=_environment,
        conf=_sentry_conf(series, sentry),
    )
    stack.build = with_others(stack.build, "together")
    with stack:
        yield stack


def test_beside_other_addons_a_notification_arrives_and_only_listeners_are_direct(stack):
    client = stack.client()
    addonlog.wait_until_confirmed(stack)
    stack.send("tests", "hello")
    client.wait_for("hello")
    # The listener of queue_job, which is told so, is one of those that are direct.
    said = traffic.statements(stack)
    listeners = {one.backend for one in said if one.listens}
    assert listeners
    assert {one.backend for one in said if not one.pooled} == listeners
    assert _troubles(stack) == []


def test_beside_other_addons_a_job_of_queue_job_is_run(stack):
    with stack.odoo.log_in() as session:
        if "session_db" in OTHERS[stack.series]:
            rows = stack.server.execute("SELECT payload FROM http_sessions", dbname=SESSIONS)
            assert LOGIN in [json.loads(row.payload)["login"] for row in rows]
        stack.odoo.wait_for_log("queue job runner ready for db", deadline=60)
        # One for which the runner has to be notified: it waits for a minute.
        answer = session.get(stack.odoo.http_url + "/queue_job/create_test_job", timeout=60)
    answer.raise_for_status()
    wait_until(lambda: _jobs(stack) == ["done"], 30, "the job to be done", tail=stack.odoo.log_tail)
    assert _troubles(stack) == []


def test_sentry_hears_of_a_lost_listener_and_of_no_password_and_odoo_ends(stack, sentry):
    client = stack.client()
    addonlog.wait_until_confirmed(stack)
    mark = stack.odoo.log_mark()
    heard = len(sentry.texts)
    stack.server.execute("SELECT pg_terminate_backend(%s)", (stack.wait_for_listen(),))
    wait_until(lambda: "lost the listener" in "".join(sentry.texts[heard:]), 20, "sentry to hear of it")
    addonlog.wait_until_confirmed(stack, mark)
    stack.send("tests", "after")
    client.wait_for("after")
    assert _troubles(stack) == []
    assert not [text for text in sentry.texts if PASSWORD in text]
    if stack.odoo.workers:
        assert stack.odoo.stop(deadline=60) == 0
        assert _troubles(stack) == []


def _environment(stack):
    stack.server.execute("CREATE DATABASE %s OWNER %s" % (SESSIONS, USER))
    return {
        "IMDISPATCHER_DB_HOST": stack.server.host,
        "IMDISPATCHER_DB_PORT": str(stack.server.port),
        # Its runner says LISTEN on a connection that it makes without Odoo.
        "ODOO_QUEUE_JOB_JOBRUNNER_DB_HOST": stack.server.host,
        "ODOO_QUEUE_JOB_JOBRUNNER_DB_PORT": str(stack.server.port),
        "SESSION_DB_URI": "postgresql://%s:%s@%s:%s/%s"
        % (USER, PASSWORD, stack.pooler.host, stack.pooler.port, SESSIONS),
        # The runner and sentry send HTTP requests to this machine.
        "no_proxy": "127.0.0.1",
    }


def _sentry_conf(series, sentry):
    options = {"sentry_enabled": True, "sentry_dsn": sentry.url}
    # From 19.0 on Odoo warns of options that it does not know.
    return {"sentry": options} if series_number(series) >= 19 else options


def _jobs(stack):
    return [row.state for row in stack.server.execute("SELECT state FROM queue_job", dbname=stack.database)]


def _troubles(stack):
    return _TROUBLE.findall(stack.odoo.log())


class _Sentry(http.server.ThreadingHTTPServer):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.texts = []
        self.url = "http://key@%s:%d/1" % self.server_address


class _SentryHandler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Content-Encoding"] == "gzip":
            body = gzip.decompress(body)
        self.server.texts.append(body.decode("utf-8", "replace"))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_arguments):
        """Nothing: the test tells."""
