{  # noqa: B018
    "name": "Other Listeners",
    "author": "bus_alt_connection contributors",
    "license": "AGPL-3",
    "depends": ["bus"],
}
