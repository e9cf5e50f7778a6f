# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).


def post_load():
    """Make Odoo's listeners connect straight to PostgreSQL.

    Odoo calls this hook of the manifest once the configuration is read, in every
    process that loads the server-wide modules. Importing the package changes nothing by
    itself, nor does a second call of the hook.
    """
    from . import patch

    patch.install()
    # Imported here, since importing the package must not add a route.
    from . import health  # noqa: F401
