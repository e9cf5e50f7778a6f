"""The Odoo database that a stack starts from."""

import contextlib
import re

from . import postgres
from .archive import archived
from .commands import say
from .odoo import Odoo, series_number

DATABASE = "bus_alt"
_DEADLINE = 600.0


def odoo_database(build, modules="bus"):
    """Return the archives of a cluster with an Odoo database: tar files ``cluster`` and ``filestore``.

    They are made by the first call for this build, these modules and this version of PostgreSQL, which takes up to a
    minute; the database is called ``bus_alt``, has no demo data, and its user ``admin`` the password ``admin``.

    :param modules: what to install, separated by commas
    :raise RuntimeError: Odoo failed
    """
    name = "odoo-%s-%s-postgresql-%s" % (build.key, modules, postgres.version())
    return archived(re.sub(r"[^\w.-]+", "+", name), lambda: _new_database(build, modules))


@contextlib.contextmanager
def _new_database(build, modules):
    with postgres.PostgreSQL({"log_statement": "none"}) as server:
        options = ["--init", modules, "--stop-after-init"]
        if series_number(build.series) < 19:
            options.append("--without-demo=all")
        odoo = Odoo(build, server, DATABASE, conf={"max_cron_threads": 0}, options=options)
        say("making a database of Odoo %s with %s ..." % (build.series, modules))
        with contextlib.closing(odoo):
            odoo.run(_DEADLINE)
            # In an incomplete source tree some wait for what they depend on, and cron does nothing as long as they do.
            waiting = "UPDATE ir_module_module SET state = 'uninstalled' WHERE state = 'to install'"
            server.execute(waiting, dbname=DATABASE)
            server.stop()
            yield {"cluster": server.data, "filestore": odoo.folder / "data"}
