{  # noqa: B018
    "name": "Future Cron",
    "summary": "For the tests: cron workers that want more of their cursor than those of any Odoo so far",
    "version": "1.0.0",
    "author": "bus_alt_connection contributors",
    "license": "AGPL-3",
    "depends": ["base"],
    "post_load": "post_load",
    "installable": True,
}
