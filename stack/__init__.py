"""Real servers and clients for tests, demo and benchmarks: PostgreSQL, PgBouncer and Odoo as context managers.

Each module knows only those further down in this list:

- :mod:`.up` runs a stack by hand, :mod:`.stack` puts one together
- :mod:`.clients` is a client of Odoo's bus, :mod:`.sender` writes into it as Odoo does
- :mod:`.database` makes the Odoo database that a stack starts from
- :mod:`.odoo`, :mod:`.pgbouncer`, :mod:`.poolers`, :mod:`.postgres` are the servers, :mod:`.proxy` a network path that
  can fail, :mod:`.namespaces` a network that can be unplugged
- :mod:`.builds` finds Odoo, in :mod:`.debian`, :mod:`.clones` or :mod:`.trees`, and :mod:`.pythons` what it runs on;
  :mod:`.others` adds other people's addons
- :mod:`.servers` finds PostgreSQL and PgBouncer, :mod:`.system` installs packages
- :mod:`.archive` keeps what takes long to make
- :mod:`.process` is what the servers have in common
- :mod:`.ports`, :mod:`.waiting`, :mod:`.commands` know nothing of the rest
"""
