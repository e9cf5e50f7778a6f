"""What tests share.

- :mod:`.variants` are the Odoos that they run on
- :mod:`.addonlog` reads what the addon has logged, :mod:`.traffic` who said what to PostgreSQL, and which way
- :mod:`.flow` sends messages all the time, :mod:`.actions` has Odoo do something
- :mod:`.payloads`, :mod:`.secrets`, :mod:`.certificates` and :mod:`.deployment` are what is tried
- :mod:`.listening` runs a listener and its supervisor in this process, :mod:`.checking` the program ``check.py``;
  :mod:`.backlog` makes databases with a bus_bus and looks into them
- :mod:`.machine` is Odoos that share a connection, :mod:`.outage` takes it away
- ``addons/`` are addons for Odoo that listen in ways of their own
"""
