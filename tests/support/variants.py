"""The variants of Odoo that tests run on."""

#: --workers; prefork has the bus in its gevent process
MODES = {"threaded": 0, "prefork": 2}

#: series and --workers; other ones with --odoo
VARIANTS = {"%s-%s" % (series, mode): (series, MODES[mode]) for series in ("14.0", "19.0") for mode in MODES}
