# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""Where the listeners connect to, from the environment and odoo.conf.

Each option is looked for in this order; an empty value counts as unset:

1. ``IMDISPATCHER_DB_HOST`` in the environment
2. ``ODOO_IMDISPATCHER_DB_HOST``, the spelling that OCA's addon reads
3. ``imdispatcher_db_host`` in the ``[options]`` of odoo.conf
4. Odoo's own ``db_host``

``HOST`` may be any libpq keyword: ``PORT``, ``USER``, ``SSLMODE`` and so on,
see https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS
"""

import difflib
import os
import re
import traceback

import psycopg2
from psycopg2 import extensions

DOCUMENTED = "IMDISPATCHER_"
ALSO_READ = "ODOO_IMDISPATCHER_"
HOST_OPTION, PORT_OPTION = "IMDISPATCHER_DB_HOST", "IMDISPATCHER_DB_PORT"

# Seconds. A listener that no longer hears itself is found out within the first;
# bus_bus is looked at every so often while nobody listens by the second.
INTERVALS = {"check_interval": 60.0, "poll_interval": 5.0}

# libpq's keywords and the release that brought them (0: older than anyone runs).
# libpq itself decides what it takes; this only tells a misspelt keyword from one
# that a newer libpq would know.
KEYWORDS = dict.fromkeys(
    "host hostaddr port dbname user password passfile connect_timeout client_encoding"
    " options application_name fallback_application_name keepalives keepalives_idle"
    " keepalives_interval keepalives_count replication sslmode sslcompression sslcert"
    " sslkey sslrootcert sslcrl requirepeer krbsrvname gsslib service"
    " target_session_attrs".split(),
    0,
)
KEYWORDS.update(gssencmode=12, tcp_user_timeout=12)
KEYWORDS.update(
    channel_binding=13,
    sslpassword=13,
    ssl_min_protocol_version=13,
    ssl_max_protocol_version=13,
)
KEYWORDS.update(sslcrldir=14, sslsni=14)
KEYWORDS.update(
    gssdelegation=16, load_balance_hosts=16, require_auth=16, sslcertmode=16
)
KEYWORDS.update(sslnegotiation=17)
KEYWORDS.update(
    min_protocol_version=18,
    max_protocol_version=18,
    oauth_client_id=18,
    oauth_client_secret=18,
    oauth_issuer=18,
    oauth_scope=18,
    scram_client_key=18,
    scram_server_key=18,
    sslkeylogfile=18,
)
# libpq reads these as numbers only once it connects, and old ones read "10s" as 10.
NUMBERS = (
    "connect_timeout",
    "keepalives",
    "keepalives_idle",
    "keepalives_interval",
    "keepalives_count",
    "tcp_user_timeout",
)
SECRETS = (
    "password",
    "sslpassword",
    "oauth_client_secret",
    "scram_client_key",
    "scram_server_key",
)
# Any of these says where PostgreSQL is.
PLACES = ("host", "hostaddr", "port", "service")

_SECRET_NAME = re.compile("pass|pw|secret|key|token|cred", re.IGNORECASE)
# Greedy, since whoever writes a password where none belongs won't escape it.
_URI_PASSWORD = re.compile(r"(://[^:/@\s]*:).*@", re.DOTALL)
_DSN_PASSWORD = re.compile(
    r"((?:password|secret|client_key|server_key)\s*=\s*).+", re.IGNORECASE | re.DOTALL
)
_USER_PASSWORD = re.compile(r"\A(\w*://)?([^:]*:).*@", re.DOTALL)


class Settings(object):
    """What was configured, and what is wrong with it.

    ``connection``: libpq keyword -> value, as configured for listeners only;
    ``check_interval`` and ``poll_interval``: seconds, 0 for off;
    ``errors`` and ``warnings``: what an operator has to be told, a line each,
    without secrets.
    """

    def __init__(self):
        self.connection = {}
        self.errors = []
        self.warnings = []
        self.check_interval = INTERVALS["check_interval"]
        self.poll_interval = INTERVALS["poll_interval"]

    @property
    def configured(self):
        """True if the settings say where PostgreSQL is."""
        return any(place in self.connection for place in PLACES)

    def parameters(self, own, system_database="postgres"):
        """Return the libpq keywords for a listener.

        ``own`` is what Odoo itself would connect with, the dictionary that its
        ``sql_db.connection_info_for`` gives. A ``dbname`` of the settings stands for
        ``system_database``, the one that Odoo sends its notifications on, and for
        no other.
        """
        parameters = dict(own)
        database = parameters.pop("database", None)
        # What Odoo pools and what listens must be told apart in pg_stat_activity.
        parameters["application_name"] = "odoo-listener-%d" % os.getpid()
        if "hostaddr" in self.connection:
            # The name that goes with it is not the pooler's.
            parameters.pop("host", None)
        parameters.update(self.connection)
        if database and (database != system_database or "dbname" not in parameters):
            parameters["dbname"] = database
        return parameters


def read(environ, options):
    """Return the `Settings` found in ``environ`` and ``options``.

    ``options`` is a mapping of odoo.conf's ``[options]``. Nothing is raised: a wrong
    option is left out and named in ``errors``.
    """
    settings = Settings()
    found = _collect(environ, options, settings)
    for option in INTERVALS:
        if option in found:
            name, value = found.pop(option)
            _read_interval(settings, option, name, value)
    named = {}
    for option, (name, value) in sorted(found.items()):
        keyword = option[len("db_") :] if option.startswith("db_") else None
        problem = _check_keyword(keyword, name, value)
        if problem:
            settings.errors.append(problem)
            continue
        # Mounted files and templates leave blanks and line ends.
        value = value if keyword in SECRETS else value.strip()
        if value:
            named[keyword] = (name, value)
    _check_places(settings, named, options.get("db_host"))
    _check_values(settings, named, options.get("db_sslmode"))
    settings.connection = {keyword: value for keyword, (_, value) in named.items()}
    return settings


def redact(text, parameters=()):
    """Return ``text`` without passwords, on one line.

    Passwords are those of ``parameters`` and whatever stands in a URI or DSN.
    """
    # In this order: a password at the end of a URI may have an "@" as well.
    text = _DSN_PASSWORD.sub(r"\1***", str(text))
    text = _URI_PASSWORD.sub(r"\1***@", text)
    for keyword in SECRETS:
        if keyword in parameters and parameters[keyword]:
            text = text.replace(str(parameters[keyword]), "***")
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def _shown(value):
    """Return the value of an option for a message: no passwords, and on one line."""
    return _USER_PASSWORD.sub(r"\1\2***@", redact(value))


def log_bug(logger, error, parameters=()):
    """Log an exception that nobody thought of, and where it came from.

    Not with ``exc_info``, which would show the message as it is.
    """
    logger.error(
        "internal error, please report it: %s\n%s",
        redact(repr(error), parameters),
        "".join(traceback.format_tb(error.__traceback__)),
    )


def address(parameters):
    """Return where ``parameters`` lead to, for a log line: ``db-01:5432``."""
    hosts, ports = _hosts_and_ports(parameters)
    return ",".join("%s:%s" % pair for pair in zip(hosts, ports))


def each_host(parameters):
    """Return a list of ``parameters``, one entry for each of their hosts.

    libpq has lists of hosts too, but waits for the first for ever if it is asked
    not to block, as it is under gevent.
    """
    lists = {
        keyword: str(parameters[keyword]).split(",")
        for keyword in ("host", "hostaddr", "port")
        if parameters.get(keyword)
    }
    number = max([len(values) for values in lists.values()] or [1])
    result = []
    for index in range(number):
        one = dict(parameters)
        for keyword, values in lists.items():
            # One port may stand for all hosts; that is libpq's rule.
            one[keyword] = values[index if len(values) == number else 0]
        result.append(one)
    return result


def _hosts_and_ports(parameters):
    split = each_host(parameters)
    hosts = [one.get("host") or one.get("hostaddr") or "local socket" for one in split]
    ports = [one.get("port") or "5432" for one in split]
    return hosts, ports


def _collect(environ, options, settings):
    """Return ``{option: (name as spelt, value)}``, options as ``db_host``."""
    found = {}
    for prefix in (DOCUMENTED, ALSO_READ):
        for name in sorted(environ):
            value = environ[name]
            if not name.startswith(prefix) or not value:
                continue
            option = name[len(prefix) :].lower()
            if option not in found:
                found[option] = (name, value)
            elif found[option][1] != value:
                settings.warnings.append(
                    "%s and %s are both set and differ; %s is used"
                    % (found[option][0], name, found[option][0])
                )
    prefix = DOCUMENTED.lower()
    for name in sorted(options):
        value = options[name]
        # Odoo writes an unset option as False, and reads it as such or as text.
        if not name.startswith(prefix) or value in (None, "", False, "False", "None"):
            continue
        found.setdefault(name[len(prefix) :], (name, str(value)))
    return found


def _read_interval(settings, option, name, value):
    try:
        seconds = float(value)
        if not 0 <= seconds < 1e6:
            raise ValueError
    except ValueError:
        settings.errors.append(
            "%s=%s is not a number of seconds; using %g. Set it to 0 (off) or more"
            % (name, _shown(value), INTERVALS[option])
        )
    else:
        setattr(settings, option, seconds)


def _check_keyword(keyword, name, value):
    """Return what is wrong with the keyword as such, or None."""
    if keyword:
        try:
            extensions.parse_dsn("%s=0" % keyword)
            return None
        except psycopg2.Error:
            pass
    if keyword in KEYWORDS:
        return (
            "%s=%s needs libpq %d or newer, this one is %s; it is left out."
            " Unset it, or install a psycopg2 built with a newer libpq"
            % (
                name,
                "***" if keyword in SECRETS else _shown(value),
                KEYWORDS[keyword],
                _libpq_version(),
            )
        )
    spelt = name.upper().split("IMDISPATCHER_", 1)[1]
    known = {word.upper(): "DB_" + word.upper() for word in KEYWORDS}
    known.update((word.upper(), word.upper()) for word in INTERVALS)
    spelt = spelt[len("DB_") :] if spelt.startswith("DB_") else spelt
    nearest = difflib.get_close_matches(spelt, known, n=1)
    secret = _SECRET_NAME.search(spelt) or nearest and nearest[0].lower() in SECRETS
    hint = "Unset it"
    if nearest:
        prefix = ALSO_READ if name.startswith(ALSO_READ) else DOCUMENTED
        meant = prefix + known[nearest[0]]
        hint = "Did you mean %s?" % (meant.lower() if name.islower() else meant)
    return "%s=%s is not an option and is left out. %s" % (
        name,
        "***" if secret else _shown(value),
        hint,
    )


def _check_places(settings, named, own_host):
    """Leave out a host or port that can't be one."""
    # The server would name these when it refuses them, and cut them short: of a URI
    # that may leave a password without its end, which nobody recognises any more.
    for keyword in ("dbname", "user", "service"):
        name, value = named.get(keyword, ("", ""))
        if "://" in value:
            settings.errors.append(
                "%s=%s is a URI and is left out. Set the host, port, user and password"
                " in an option each" % (name, _shown(value))
            )
            del named[keyword]
    if "host" in named:
        name, value = named["host"]
        if "://" in value or "@" in value or "=" in value:
            settings.errors.append(
                "%s=%s is not a host name and is left out. Set the host, port, user"
                " and password in an option each" % (name, _shown(value))
            )
            del named["host"]
    if "host" in named and "hostaddr" in named:
        name, value = named["hostaddr"]
        addresses, hosts = (len(named[k][1].split(",")) for k in ("hostaddr", "host"))
        if addresses != hosts:
            settings.errors.append(
                "%s=%s has %d address(es) for %d host(s) and is left out. Set one for"
                " each host" % (name, _shown(value), addresses, hosts)
            )
            del named["hostaddr"]
    if "port" not in named:
        return
    name, value = named["port"]
    ports = value.split(",")
    if not all(map(_is_port, ports)):
        settings.errors.append(
            "%s=%s is not a port and is left out. Set it to a number from 1 to 65535,"
            " or one for each host, separated by commas" % (name, _shown(value))
        )
        del named["port"]
    elif len(ports) > 1:
        _, hosts = named.get("hostaddr") or named.get("host") or ("", own_host or "")
        number = len(hosts.split(","))
        if len(ports) != number:
            settings.errors.append(
                "%s=%s has %d ports for %d host(s) and is left out. Set one port,"
                " or one for each host" % (name, value, len(ports), number)
            )
            del named["port"]


def _is_port(text):
    # Not isdigit(): there are digits that int() does not know, or libpq.
    text = text.strip()
    return not text or bool(re.match(r"[0-9]{1,9}\Z", text)) and 0 < int(text) < 65536


def _check_values(settings, named, own_sslmode):
    """Leave out the values that libpq would refuse to connect with."""
    for keyword in NUMBERS:
        # More digits are more than libpq takes.
        if keyword in named and not re.match(r"\s*-?[0-9]{1,9}\s*\Z", named[keyword][1]):
            name, value = named.pop(keyword)
            settings.errors.append(
                "%s=%s is not a whole number and is left out. Set it to one, or unset it"
                % (name, _shown(value))
            )
    # Some values are right or wrong only together, so they are added one by one.
    accepted = {"sslmode": own_sslmode} if own_sslmode else {}
    for keyword in sorted(named, key=lambda k: (not k.startswith("sslmode"), k)):
        if keyword in PLACES[:3]:
            continue
        name, value = named[keyword]
        refusal = _refusal(dict(accepted, **{keyword: value}))
        if refusal is None:
            accepted[keyword] = value
            continue
        secret = keyword in SECRETS
        settings.errors.append(
            "%s=%s is left out: %s"
            % (
                name,
                "***" if secret else _shown(value),
                "libpq refuses it"
                if secret
                else redact(refusal.replace(value, _shown(value))),
            )
        )
        del named[keyword]


def _refusal(parameters):
    """Return why libpq would not even try to connect with ``parameters``, or None.

    It is asked to connect to what is no address. If the values are good it says just
    that, in whatever language and words.
    """
    nobody = {"host": "", "hostaddr": "nobody", "port": "1"}
    told = []
    for tried in (nobody, dict(parameters, **nobody)):
        try:
            psycopg2.connect(**tried).close()
        except (psycopg2.Error, TypeError) as error:
            told.append(str(error))
    return told[-1] if told and told[0] != told[-1] else None


def _libpq_version():
    version = extensions.libpq_version()
    if version >= 100000:
        return "%d.%d" % (version // 10000, version % 10000)
    return "%d.%d" % (version // 10000, version // 100 % 100)
