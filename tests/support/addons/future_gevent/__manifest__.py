{  # noqa: B018
    "name": "Future Gevent",
    "summary": "For the tests: several gevent processes, as Odoo 19.2 has them",
    "version": "1.0.0",
    "author": "bus_alt_connection contributors",
    "license": "AGPL-3",
    "depends": ["bus"],
    "post_load": "post_load",
    "installable": True,
}
