"""Real servers and clients for tests, demo and benchmarks: PostgreSQL, PgBouncer and Odoo as context managers.

Each module knows only those further down in this list:

- :mod:`.up` runs a stack for other tools, :mod:`.stack` puts one together
- :mod:`.clients` are clients of Odoo's bus, :mod:`.sender` writes into it as Odoo does
- :mod:`.database` makes the Odoo database that a stack starts from
- :mod:`.odoo`, :mod:`.pgbouncer`, :mod:`.postgres` are the servers, :mod:`.proxy` a network path that can fail
- :mod:`.builds` finds Odoo (:mod:`.pythons`), :mod:`.servers` and :mod:`.interpreters` other versions of PostgreSQL and
  Python, all in :mod:`.debian`; :mod:`.system` finds everything else
- :mod:`.archive` keeps what takes long to make
- :mod:`.process` is what the servers have in common
- :mod:`.guard`, :mod:`.ports`, :mod:`.waiting`, :mod:`.commands` know nothing of the rest
"""
