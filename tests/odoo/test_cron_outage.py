"""Cron threads and cron workers survive the loss of their connection; stock ones die of it."""

import contextlib
import re

import pytest

from stack.database import DATABASE
from stack.odoo import series_number
from stack.stack import Stack
from stack.waiting import wait_until
from tests.support.cron import who_looked_for_jobs

ANOTHER = "another"
# Much less than the minute after which cron looks for jobs without being told.
AT_ONCE = 10


# Up to 14.0 cron has no connection to lose.
pytestmark = pytest.mark.variants(since=15)


@pytest.fixture(scope="module")
def stack(variant):
    """A stack with two cron threads or workers and two databases; each has one job, which runs when it is triggered.

    Up to 18.0 it has one cron thread only: with several databases the threads of stock Odoo may end each other, since
    the dictionary of registries changes under the loop that they walk through it.
    """

    def environment(stack):
        only_our_job(stack)
        stack.server.execute("CREATE DATABASE %s TEMPLATE %s OWNER %s" % (ANOTHER, DATABASE, stack.server.user))
        return {}

    series, workers = variant
    threads = 2 if workers or series_number(series) >= 19 else 1
    conf = {"max_cron_threads": threads, "db_name": "%s,%s" % (DATABASE, ANOTHER)}
    options = ["--log-handler=odoo.service.server:DEBUG"]
    with Stack(series, workers, environment=environment, conf=conf, options=options, proxy=True) as stack:
        yield stack


def only_our_job(stack):
    jobs = stack.server.execute(
        """
        UPDATE ir_cron SET active = (id = (SELECT min(id) FROM ir_cron)), nextcall = now() + interval '1 year'
        RETURNING id, ir_actions_server_id AS action
        """,
        dbname=DATABASE,
    )
    stack.job = min(jobs)
    stack.server.execute("DELETE FROM ir_cron_trigger", dbname=DATABASE)
    stack.server.execute(
        "UPDATE ir_act_server SET state = 'code', code = $$log('our job ran')$$ WHERE id = %s",
        (stack.job.action,),
        DATABASE,
    )


def trigger(stack, dbname=DATABASE):
    """Have the job run as soon as possible, the way that Odoo does."""
    stack.server.execute(
        # Odoo keeps whole seconds, and leaves triggers that are later than the second in which the job began.
        "INSERT INTO ir_cron_trigger (cron_id, call_at) VALUES (%s, date_trunc('second', now() AT TIME ZONE 'UTC'))",
        (stack.job.id,),
        dbname,
    )
    with contextlib.closing(stack.sender()) as sender:
        sender.notify(dbname, "cron_trigger")


def runs(stack, dbname=DATABASE):
    return stack.server.value("SELECT count(*) FROM ir_logging WHERE message = 'our job ran'", dbname=dbname)


def wait_for_run(stack, after, dbname=DATABASE):
    """Wait until the job has run more than ``after`` times, and there is no more to do."""

    def done():
        # Odoo runs a job once more, if what it has done was not committed.
        left = stack.server.execute("SELECT FROM ir_cron_trigger", dbname=dbname)
        return runs(stack, dbname) > after and not left

    wait_until(done, AT_ONCE, "the job to run at once", 0.05, stack.odoo.log_tail)


def trigger_and_wait(stack):
    before = runs(stack)
    trigger(stack)
    wait_for_run(stack, before)


def wait_until_confirmed(stack, mark, what="listening"):
    """Wait until every process with a cron listener hears itself."""
    wanted = stack.odoo.conf["max_cron_threads"] if stack.odoo.workers else 1

    def confirmed():
        pattern = r"^\S+ \S+ (\d+) .*" + what + r" on cron_trigger (?:through process \d+ )?at .* confirmed"
        return len(set(re.findall(pattern, stack.odoo.log_since(mark), re.MULTILINE))) >= wanted

    wait_until(confirmed, 15, "%d of %r" % (wanted, what), 0.05, stack.odoo.log_tail)


@pytest.mark.matrix
def test_jobs_triggered_in_an_outage_run_right_after_it(stack):
    wait_until_confirmed(stack, 0)
    processes = stack.odoo.processes()
    trigger_and_wait(stack)

    before = runs(stack)
    assert runs(stack, ANOTHER) == 0
    mark = stack.odoo.log_mark()
    stack.proxy.refuse()
    stack.proxy.cut()
    stack.odoo.wait_for_log("WARNING .*lost the listener", mark)
    trigger(stack)
    trigger(stack, ANOTHER)
    with pytest.raises(TimeoutError):
        wait_until(lambda: runs(stack) > before or runs(stack, ANOTHER), 2)

    stack.proxy.forward()
    wait_for_run(stack, before)
    wait_for_run(stack, 0, ANOTHER)
    wait_until_confirmed(stack, mark, "listening again")

    # No thread and no worker has died of it, and they go on to listen.
    assert stack.odoo.processes().cron == processes.cron
    mark = stack.odoo.log_mark()
    trigger_and_wait(stack)
    threads = stack.odoo.conf["max_cron_threads"]
    wait_until(lambda: len(who_looked_for_jobs(stack, mark)) == threads, AT_ONCE, "all to look for jobs")
