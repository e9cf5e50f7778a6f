# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""Read the options for the listeners' connection from the environment and odoo.conf.

Each option is looked up in this order; an empty value counts as unset:

1. ``IMDISPATCHER_DB_HOST`` in the environment
2. ``ODOO_IMDISPATCHER_DB_HOST``, the spelling that OCA's addon reads
3. ``imdispatcher_db_host`` in the ``[options]`` of odoo.conf
4. Odoo's own ``db_host``

``HOST`` may be any libpq keyword: ``PORT``, ``USER``, ``SSLMODE`` and so on,
see https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS

``NAME``, which some versions of OCA's addon use, means ``DBNAME``.

A wrong value of one of the addon's own options is replaced, see `_IF_WRONG`. All others fail closed, as do unknown
options: a wrong option may be the one that protects the connection. For example, the sslmode "requrie":

- `read` notes the problem in ``errors`` and the name in ``refused``. `patch` logs "IMDISPATCHER_DB_SSLMODE is not an
  sslmode. Did you mean require? No listener connects until this is corrected". Odoo starts.
- At each attempt to connect, `Settings.parameters` raises an error before anything is sent, be it to PostgreSQL or to a
  leader. The log has "can't listen on database ...", and then "still not listening" once a minute.
- `supervisor` polls bus_bus through the pooler. So users get messages a few seconds late, and scheduled actions start
  up to a minute late. The health check is "degraded" (200); if polling is off, it is "fail" (503).
- Options are read once, so this lasts until the option is corrected and Odoo is restarted.

libpq checks most values itself, at each attempt to connect. The result is the same, in libpq's words.
"""

import difflib
import os
import re

import psycopg2
from psycopg2 import extensions

from .log import SECRETS, redact

# The addon's own options: seconds until a listener that receives nothing is noticed, seconds between two
# look-ups of bus_bus while nothing listens, and whether the processes of a machine share a direct connection.
DEFAULTS = {"check_interval": 60.0, "poll_interval": 5.0, "share": True}
# The values that replace wrong ones. A process that may have been told not to share must not share.
_IF_WRONG = dict(DEFAULTS, share=False)
# Every text that a series of Odoo accepts as a boolean, on the command line or in odoo.conf.
_BOOLEANS = dict.fromkeys("1 t true y yes on".split(), True)
_BOOLEANS.update(dict.fromkeys("0 f false n no off".split(), False))
_ALIASES = {"db_name": "db_dbname"}

# Each of these keywords can say where PostgreSQL is.
PLACES = ("host", "hostaddr", "port", "service")
SSLMODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
# Keywords to propose for a misspelt one. libpq itself decides which keywords exist.
_USUAL = (
    "host hostaddr port service dbname user password passfile sslmode sslrootcert sslcert sslkey sslpassword sslcrl"
    " connect_timeout channel_binding require_auth target_session_attrs application_name gssencmode options"
)
_DSN = re.compile(r"://|(password|secret|_key)\s*=", re.IGNORECASE)
# An IPv6 address has at least two colons; the path of a socket begins with a slash, the name of an abstract one with @.
_HOST_WITH_PORT = re.compile(r"([^:/@\[][^:]*|\[.*\]):[^:]*\Z")
# Match the variables that Kubernetes sets in each pod for a Service that is called "imdispatcher-db" or the like.
_OF_SERVICE = re.compile(r"(\w+_)?(service_host|service_port(_\w+)?|port_\d+_(tcp|udp|sctp)(_addr|_port|_proto)?)\Z")
_PORT_OF_SERVICE = re.compile(r"(tcp|udp|sctp)://")
_REFUSED = "No listener connects until this is corrected"


class Settings(object):
    """The configured options, and what is wrong with them.

    ``connection``: libpq keyword -> value, as configured for listeners only;
    ``system_database``: the database that replaces ``postgres`` for pooled and direct connections, or None;
    ``check_interval`` and ``poll_interval``: seconds, 0 for off; ``share``: a bool; ``errors`` and ``warnings``: lines
    for the operator, which never contain the value of an option;
    ``refused``: the names of wrong options; while there are any, no listener may connect.
    """

    def __init__(self):
        self.connection = {}
        self.system_database = None
        self.errors, self.warnings, self.refused = [], [], []
        vars(self).update(DEFAULTS)

    @property
    def configured(self):
        """True if the settings say where PostgreSQL is."""
        return any(place in self.connection for place in PLACES)

    def parameters(self, own):
        """Return the libpq keywords for a listener. Raises ``psycopg2.OperationalError`` if options are refused.

        ``own`` has the keywords with which Odoo itself connects. Its ``dbname`` is kept, since a listener
        has to be in the database in which Odoo sends.
        """
        if self.refused:
            raise psycopg2.OperationalError(
                "some options are wrong. Correct those that Odoo logged as ERROR when it started, and restart Odoo"
            )
        # The name distinguishes listeners from Odoo's other connections in pg_stat_activity.
        parameters = dict(own, application_name="odoo-listener-%d" % os.getpid())
        if "hostaddr" in self.connection or "service" in self.connection:
            # Odoo's own host is the pooler's; it does not belong to this address.
            parameters.pop("host", None)
        if "service" in self.connection:
            parameters.pop("port", None)
            # Modes up to "prefer" are not stronger than libpq's default, but would override a stronger mode of
            # the service.
            if parameters.get("sslmode") in SSLMODES[: SSLMODES.index("prefer") + 1]:
                del parameters["sslmode"]
        if "passfile" in self.connection:
            # libpq reads the file only if it has no other password. This drops Odoo's own and hides PGPASSWORD.
            parameters["password"] = ""
        parameters.update(self.connection)
        return parameters


def read(environ, options, db_system=None):
    """Return the `Settings` found in ``environ`` and ``options``.

    ``options`` is a mapping of odoo.conf's ``[options]``. ``db_system`` is the value of Odoo's own
    option of that name, None if it has none. Raises nothing; ``errors`` names what is wrong.
    """
    settings = Settings()
    found = _collect(environ, options, settings)
    _refuse_variables_of_kubernetes(found, settings)
    undecided = "db_sslmode" not in found and options.get("db_sslmode") in ("require", "verify-ca")
    for option, (name, value) in sorted(found.items()):
        if option in DEFAULTS:
            _set_own(option, name, value, settings)
            continue
        keyword = option[len("db_") :] if option.startswith("db_") else ""
        problem = _problem(keyword, value) if _is_keyword(keyword) else _meant(option, name)
        if keyword == "service" and undecided:
            problem = "may require a stricter sslmode than db_sslmode. Set the one to use in IMDISPATCHER_DB_SSLMODE."
        if problem:
            settings.errors.append("%s %s %s" % (name, problem, _REFUSED))
            settings.refused.append(name)
        else:
            settings.connection[keyword] = value
    database = settings.connection.pop("dbname", None)
    settings.system_database = None if db_system else database
    if database and db_system not in (None, database):
        settings.warnings.append("%s and Odoo's own db_system differ; db_system is used" % found["db_dbname"][0])
    return settings


def address(parameters):
    """Return where ``parameters`` lead to, for a log line: ``db-01:5432``."""
    place = parameters.get("host") or parameters.get("hostaddr")
    if not place and parameters.get("service"):
        return "service %s" % parameters["service"]
    hosts = str(place or "local socket").split(",")
    ports = str(parameters.get("port") or "5432").split(",")
    # Odoo's own db_host may be a URI by mistake.
    return redact(",".join("%s:%s" % (host, ports[index % len(ports)] or "5432") for index, host in enumerate(hosts)))


def _collect(environ, options, settings):
    """Return ``{option: (name as spelt, value)}``, with options such as ``db_host``."""
    found = {}
    for prefix, source in (("IMDISPATCHER_", environ), ("ODOO_IMDISPATCHER_", environ), ("imdispatcher_", options)):
        for name in sorted(name for name in source if name.startswith(prefix)):
            option, value = name[len(prefix) :].lower(), str(source[name])
            option = _ALIASES.get(option, option)
            # Values from mounted files and templates may have blanks and line ends around them. In a password they
            # may be intended.
            if option[len("db_") :] not in SECRETS:
                value = value.strip()
            # Odoo writes an unset option as False.
            if not value or source is options and value in ("False", "None") and option != "share":
                continue
            used, known = found.setdefault(option, (name, value))
            if used in source and known != value:
                settings.warnings.append("%s and %s are both set and differ; %s is used" % (used, name, used))
    return found


def _refuse_variables_of_kubernetes(found, settings):
    """Move the variables of a Kubernetes Service from ``found`` to ``settings.refused``; report them in one line."""
    refused = []
    for option, (name, value) in sorted(found.items()):
        is_port = option == "port" or option.endswith("_port")
        if _OF_SERVICE.match(option) or is_port and _PORT_OF_SERVICE.match(value):
            refused.append(name)
            del found[option]
    if refused:
        names = refused[0] if len(refused) == 1 else "%s and %d more" % (refused[0], len(refused) - 1)
        text = "%s: Kubernetes sets such variables for a Service. Rename the Service, or set enableServiceLinks: false"
        text += " in the pod. Without Kubernetes, unset them. %s"
        settings.errors.append(text % (names, _REFUSED))
        settings.refused += refused


def _set_own(option, name, value, settings):
    """Set one of the addon's own options. If its value is wrong, report that and use another value."""
    meaning = _meaning(option, value)
    if meaning is None:
        meaning = _IF_WRONG[option]
        number = "is not a number of seconds. Set it to 0 (off) or more."
        problem = "is not a boolean. Set it to 1 (on) or 0 (off)." if option == "share" else number
        settings.errors.append("%s %s Using %g" % (name, problem, meaning))
    setattr(settings, option, meaning)


def _meaning(option, value):
    """Return the bool or the number that the string ``value`` stands for; None if it stands for neither."""
    if option == "share":
        return _BOOLEANS.get(value.lower())
    # float() alone would accept nan and inf.
    if re.match(r"[0-9]*\.?[0-9]+(e[0-9])?\Z", value) and float(value) < 1e6:
        return float(value)
    return None


def _is_keyword(keyword):
    """Return whether libpq knows ``keyword``."""
    try:
        return keyword in extensions.parse_dsn("%s=0" % keyword)
    except (psycopg2.Error, UnicodeError):
        return False


def _problem(keyword, value):
    """Return what is wrong with the value of a libpq keyword and what to do, without the value; or None."""
    if keyword in SECRETS or keyword.startswith("oauth_"):
        return None
    # The server would take a URI or DSN for a name, and its error would quote a truncated copy, in which `redact` might
    # miss the password.
    if _DSN.search(value) or keyword in PLACES and re.search(".@|=", value):
        return "is a URI or DSN. Set host, port, user and password in separate options."
    if keyword in ("host", "hostaddr") and any(_HOST_WITH_PORT.match(host.strip()) for host in value.split(",")):
        return "has a port. Set the host alone here, and the port in IMDISPATCHER_DB_PORT."
    if keyword == "sslmode" and value not in SSLMODES:
        nearest = difflib.get_close_matches(value.lower(), SSLMODES, n=1)
        return "is not an sslmode. Did you mean %s?" % (nearest or SSLMODES[-1:])[0]
    # The addon applies this timeout itself, since libpq does not when it connects without blocking.
    if keyword == "connect_timeout" and not re.match(r"-?[0-9]{1,9}\Z", value):
        return "is not a whole number of seconds."
    return None


def _meant(option, name):
    options = ["db_" + keyword for keyword in _USUAL.split()] + sorted(DEFAULTS)
    nearest = difflib.get_close_matches(option, options, n=1)
    if not nearest:
        return "is not an option. Unset it."
    if option in options:
        return "is not known to this libpq. Unset it, or install a psycopg2 that has a newer libpq."
    meant = name[: len(name) - len(option)].lower() + nearest[0]
    return "is not an option. Did you mean %s?" % (meant if name.islower() else meant.upper())
