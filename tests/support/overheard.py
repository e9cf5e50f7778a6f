"""What is notified, as PostgreSQL has it."""

import contextlib

from stack.waiting import wait_until


@contextlib.contextmanager
def overheard(server, dbname="postgres"):
    """Yield a list that has, when the context is left, what every Odoo on ``dbname`` has heard meanwhile."""
    heard = []
    with contextlib.closing(server.connect(dbname, application_name="tests")) as foreign:
        foreign.autocommit = True
        foreign.cursor().execute("LISTEN imbus; LISTEN cron_trigger; LISTEN the_end")
        yield heard
        # All come in the order in which they were sent.
        server.execute("NOTIFY the_end", dbname=dbname)

        def ended():
            foreign.poll()
            return foreign.notifies and foreign.notifies[-1].channel == "the_end"

        wait_until(ended, 10, "the last notification")
        heard += foreign.notifies[:-1]
