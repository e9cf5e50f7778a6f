"""What the files for those who deploy have in common."""

from bus_alt_connection import settings
from stack.odoo import default_load

#: how Odoo is to be started
LOAD = "--load=%s,bus_alt_connection" % default_load("19.0")


def direct_address(environment):
    """Return the address that the listeners get from these variables."""
    found = settings.read({name: value for name, value in environment.items() if value}, {})
    assert found.errors == found.warnings == []
    return settings.address(found.connection)
