"""The tests, by what they need: ``unit`` no server, ``postgres`` no Odoo, ``odoo`` all of it.

:mod:`.support` is what they share; the servers are in :mod:`stack`.
"""
