"""What ``make up`` takes from the environment, and what it refuses in one line."""

import pytest

from stack import up


@pytest.fixture
def asked(monkeypatch):
    """Return a function that gives the arguments of the stack that variables ask for; there is none."""
    monkeypatch.setattr(up, "Stack", lambda series, **arguments: {"series": series, **arguments})
    return up.stack_from


def test_without_variables_it_is_a_threaded_odoo_with_the_addon_behind_a_pooler(asked):
    assert asked({"HOME": "/root", "WORKERS": " "}) == {
        "series": None,
        "workers": 0,
        "addon": str(up.ADDON),
        "pooler": True,
        "direct": True,
        "modules": "bus",
        "tree": None,
        "python": None,
        "environment": {},
        "load": None,
        "conf": {"max_cron_threads": 1},
    }


@pytest.mark.parametrize(
    ("name", "value", "argument", "given"),
    [
        ("SERIES", "14.0", "series", "14.0"),
        ("WORKERS", "2", "workers", 2),
        ("CRON", "3", "conf", {"max_cron_threads": 3}),
        ("CRON", "0", "conf", {"max_cron_threads": 0}),
        ("ADDON", "none", "addon", None),
        ("POOLER", "none", "pooler", False),
        ("DIRECT", "none", "direct", False),
        ("MODULES", "bus,mail", "modules", "bus,mail"),
        ("LOAD", "base,web", "load", "base,web"),
        ("PYTHON", "3.9", "python", "3.9"),
        ("IMDISPATCHER_DB_PORT", "1", "environment", {"IMDISPATCHER_DB_PORT": "1"}),
        ("ODOO_IMDISPATCHER_DB_PORT", "1", "environment", {"ODOO_IMDISPATCHER_DB_PORT": "1"}),
    ],
)
def test_each_variable_is_passed_on(asked, name, value, argument, given):
    assert asked({name: value})[argument] == given


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("SERIES", "nineteen", "not a series of Odoo, such as 19.0"),
        ("ODOO", "/nowhere", "not a source tree of Odoo"),
        ("WORKERS", "-1", "not a number"),
        ("CRON", "two", "not a number"),
        ("CRON", "-1", "not a number"),
        ("ADDON", "/nowhere", "no addon bus_alt_connection in this folder"),
        ("POOLER", "pgpool", "neither pgbouncer nor none"),
        ("DIRECT", "yes", "only none is known"),
        ("MODULES", "bus, mail", "not names of modules, separated by commas"),
        ("POSTGRESQL", "9", "Debian's packages have 17, 18, 19; leave it out for that of this machine"),
        ("PGBOUNCER", "1.24", "Debian's packages have trixie, sid; leave it out for that of this machine"),
    ],
)
def test_what_is_no_good_is_refused(asked, name, value, why):
    with pytest.raises(up.Refused) as refused:
        asked({name: value})
    assert str(refused.value) == "%s=%s: %s" % (name, value, why)
