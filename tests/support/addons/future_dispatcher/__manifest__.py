{  # noqa: B018
    "name": "Future Dispatcher",
    "summary": "For the tests: listens on the bus as the dispatcher of Odoo 20.0 does",
    "version": "1.0.0",
    "author": "bus_alt_connection contributors",
    "license": "AGPL-3",
    "depends": ["bus"],
    "post_load": "post_load",
    "installable": True,
}
