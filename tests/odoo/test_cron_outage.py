"""Cron threads and cron workers survive the loss of their connection; stock ones die of it."""

import contextlib

import pytest

from stack.database import DATABASE
from stack.odoo import series_number
from stack.stack import Stack
from stack.waiting import wait_until
from tests.support.machine import Machine
from tests.support.outage import direct_way_closed

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


@pytest.mark.matrix
def test_jobs_triggered_in_an_outage_run_right_after_it(stack):
    machine = Machine(stack)
    machine.settle(bus=False)
    workers = stack.odoo.processes().cron
    trigger(stack)
    wait_for_run(stack, 0)

    before = runs(stack)
    with direct_way_closed(stack):
        trigger(stack)
        trigger(stack, ANOTHER)
        with pytest.raises(TimeoutError):
            wait_until(lambda: runs(stack) > before or runs(stack, ANOTHER), 2)
    wait_for_run(stack, before)
    wait_for_run(stack, 0, ANOTHER)

    # No thread and no worker has died of it, and they go on to listen.
    machine.settle(bus=False)
    assert stack.odoo.processes().cron == workers
    machine.trigger_cron()
