{  # noqa: B018
    "name": "Other Listeners",
    "summary": "For the tests: listeners that are none of Odoo's own, and requests that show which way they take",
    "version": "1.0.0",
    "author": "bus_alt_connection contributors",
    "license": "AGPL-3",
    "depends": ["bus"],
    "installable": True,
}
