"""A worker takes hardly more address space than in stock; that is what Odoo's ``limit_memory_soft`` counts."""

import re
from pathlib import Path

import pytest

from stack.waiting import wait_until
from tests.support.machine import Machine

#: megabytes
ALLOWANCE = 16

pytestmark = [pytest.mark.rest, pytest.mark.variants("19.0-prefork")]


def address_space(pid):
    """Return the megabytes of address space that a process has."""
    return int(re.search(r"VmSize:\s+(\d+) kB", Path("/proc/%d/status" % pid).read_text())[1]) / 1024


def measured(stack):
    """Return the megabytes of each process that listens, after it has worked."""
    wait_until(lambda: _are_all_there(stack), 30, "all workers", tail=stack.odoo.log_tail)
    with stack.client() as client:
        for number in range(20):
            stack.send("tests", number)
        Machine(stack).trigger_cron()
        client.wait_for(19, 20)
        if stack.odoo.addon:
            Machine(stack).settle(lasting=4)
        processes = stack.odoo.processes()
        return [address_space(pid) for pid in (processes.gevent, *sorted(processes.cron))]


def _are_all_there(stack):
    processes = stack.odoo.processes()
    return processes.gevent and len(processes.cron) == stack.odoo.conf["max_cron_threads"]


def test_a_worker_takes_hardly_more_address_space_than_in_stock(new_stack):
    same = {
        "jobs": False,
        "conf": {"max_cron_threads": 2},
        # So that it says which of its workers look for jobs.
        "options": ["--log-handler=odoo.service.server:DEBUG"],
    }
    ours = measured(new_stack(environment={"IMDISPATCHER_CHECK_INTERVAL": "3"}, **same))
    # Behind the pooler it would hear nothing.
    stock = measured(new_stack(addon=None, pooler=False, **same))
    assert max(one - other for one, other in zip(ours, stock)) <= ALLOWANCE, (ours, stock)
