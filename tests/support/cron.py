"""Cron threads and cron workers, by what Odoo logs with ``--log-handler=odoo.service.server:DEBUG``."""

import re


def who_looked_for_jobs(stack, mark):
    """Return the names of those that have looked for jobs after a mark in the log."""
    return set(re.findall(r"(cron\d+|WorkerCron \(\d+\)) polling for jobs", stack.odoo.log_since(mark)))
