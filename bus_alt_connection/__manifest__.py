# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
{
    "name": "Bus Alt Connection",
    "summary": "Needed when using PgBouncer as a connection pooler",
    # Three parts: the only form that every series from 12.0 to 19.1 loads.
    "version": "1.0.0",
    # No "website", since the project has no page of its own.
    "author": "bus_alt_connection contributors",
    "category": "Extra Tools",
    "license": "AGPL-3",
    "depends": ["bus"],
    "external_dependencies": {"python": ["psycopg2"]},
    "post_load": "post_load",
}
