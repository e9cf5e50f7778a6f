"""The problem, and the addon solving it, on real servers: ``make demo``.

:mod:`.__main__` tells the story, :mod:`.trial` measures one Odoo, :mod:`.report` compares two.
"""
