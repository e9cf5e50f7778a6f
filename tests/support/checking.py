"""The program ``check.py``, run as an operator does."""

import os
import re
import subprocess
import sys

from stack.postgres import PASSWORD, USER
from stack.stack import ADDON

CHECK = ADDON / "bus_alt_connection" / "check.py"
HEARD = "OK: listeners hear what Odoo sends"
_FOREIGN = re.compile("PG|IMDISPATCHER_|ODOO_|OPENERP_|HOME$|PYTHON")


def odoo_conf(through, **options):
    """Return the text of the odoo.conf of an Odoo that connects to ``through``."""
    place = {"db_host": through.host, "db_port": through.port, "db_user": USER, "db_password": PASSWORD}
    return "[options]\n" + "".join("%s = %s\n" % item for item in {**place, **options}.items())


def directly_to(server, **options):
    """Return the variables that send the listeners to ``server``."""
    found = {"HOST": server.host, "PORT": str(server.port), **options}
    return {"IMDISPATCHER_DB_" + name: value for name, value in found.items()}


def run_check(folder, conf, variables, *arguments, program=(sys.executable, CHECK)):
    """Run it with an odoo.conf of this text (None: without); return its exit code and what it prints."""
    if conf is not None:
        (folder / "odoo.conf").write_text(conf)
        arguments = ("-c", folder / "odoo.conf", *arguments)
    kept = {name: value for name, value in os.environ.items() if not _FOREIGN.match(name)}
    done = subprocess.run(
        [*program, *arguments],
        env={**kept, "HOME": str(folder), **variables},
        cwd=ADDON,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    print(done.stdout)
    return done.returncode, done.stdout
