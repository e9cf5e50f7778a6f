{  # noqa: B018
    "name": "Future",
    "author": "bus_alt_connection contributors",
    "license": "AGPL-3",
    "depends": ["bus"],
    "post_load": "post_load",
}
