"""Containers: ``demo/compose.yaml`` and parts of ``docs/kubernetes.yaml``, run as they are, with Podman.

    python -m tools.containers

Needs root. The images have their public names, but are made of Debian's packages and the scripts beside this file,
which have the interface of the public images. The clone that users make is one of what is committed, under umask 077.
The clients are outside of the containers. A run in which nothing failed is written to ``docs/containers.rst``. What was
downloaded stays in ``.stack/containers/``.
"""

import datetime
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tabulate import tabulate

from stack.commands import CommandError, reason, run, say
from stack.debian import find_mirror, minimal_system
from stack.odoo import http_session
from stack.waiting import wait_until

from ..fresh import ROOT
from . import services
from .kubernetes import kubernetes
from .services import FOLDER, ODOO, podman

HERE = Path(__file__).parent
DOCUMENT = ROOT / "docs" / "containers.rst"
# What the images are made of: packages of Debian 13. Only sid has Odoo, which does not run on the Python of sid.
SYSTEMS = {
    "postgres": ["postgresql-17"],
    "pgbouncer": ["pgbouncer"],
    "odoo": ["odoo-19,curl,postgresql-client,tzdata-legacy", "sid"],
}


def up():
    began = time.monotonic()
    services.compose("up", "--detach")
    odoo = services.odoo_at("127.0.0.1")
    started = time.monotonic() - began
    services.create_database(odoo)
    return "answers after %.0f s; %s" % (started, services.try_out(odoo, direct=1, name=ODOO))


def restart(name):
    """Restart a service while messages flow."""
    seconds = []

    def action():
        began = time.monotonic()
        podman("restart", name)
        seconds.append(time.monotonic() - began)

    arrived = services.push(services.odoo_at("127.0.0.1"), action=action)
    return "%.1f s; %s" % (seconds[0], arrived)


def without_addon():
    """Take the addon away from Odoo, which starts without it: the healthcheck fails."""
    well = [_is_healthy()]
    for mode in ("000", "755"):
        podman("exec", "--user", "root", ODOO, "chmod", mode, services.ADDONS + services.PROJECT)
        podman("restart", ODOO)
        wait_until(_serves, 120, "Odoo to serve", 0.5)
        well.append(_is_healthy())
    return _expect(well, "while Odoo can't read the addon")


def replicas(workers):
    podman("rm", "--all", "--force")
    services.compose("-f", HERE / "two.yaml", "up", "--detach", HTTP_PORT="", WORKERS=str(workers))
    places = [services.address(name) for name in (ODOO, services.SECOND_ODOO)]
    odoos = [services.odoo_at(place, event_port=8072 if workers else None) for place in places]
    return services.try_out(*odoos, direct=2, name=ODOO)


def silent_gevent():
    """Stop the gevent process of a prefork Odoo, while its HTTP workers answer: the healthcheck fails."""
    well = [_is_healthy()]
    for name in ("STOP", "CONT"):
        # In our namespace there are no other processes.
        run(["pkill", "-" + name, "-f", "odoo gevent"])
        well.append(_is_healthy())
    return _expect(well, "while the gevent process is stopped")


def end():
    """End one of two Odoos by SIGTERM."""
    began = time.monotonic()
    podman("stop", "--time", "30", services.SECOND_ODOO)
    took = time.monotonic() - began
    code = podman("inspect", "--format", "{{.State.ExitCode}}", services.SECOND_ODOO)
    podman("stop", "--time", "30", ODOO)
    return "exit code %s after %.1f s" % (code, took)


def confined():
    secret = FOLDER / "password"
    secret.write_text("odoo\n")
    secret.chmod(0o644)
    options = ["--read-only", "--tmpfs=/tmp", "--cap-drop=all", "--security-opt=no-new-privileges", "--pids-limit=100"]
    options += ["--network=" + services.NETWORK, "--volume=%s:/run/password:ro" % secret]
    variables = {"HOST": "pgbouncer", "PORT": "6432", "USER": "odoo", "PASSWORD_FILE": "/run/password"}
    _run_odoo("confined", options, variables, "--workers=2")
    odoo = services.odoo_at(services.address("confined"), event_port=8072)
    seen = services.try_out(odoo, direct=1, name="confined")
    podman("rm", "--force", "confined")
    return seen


def pod():
    podman("pod", "create", "--name=pod", "--network=" + services.NETWORK)
    variables = {"PGHOST": "pgbouncer", "PGPORT": "6432", "PGUSER": "odoo", "PGPASSWORD": "odoo"}
    _run_odoo("first", ["--pod=pod"], variables)
    _run_odoo("second", ["--pod=pod"], variables, "--http-port=8079")
    place = services.address_of_pod("pod")
    return services.try_out(services.odoo_at(place), services.odoo_at(place, port=8079), direct=2, name="first")


TRIALS = {
    "Compose, from a clone made under umask 077": up,
    "``db`` restarted while messages flow": lambda: restart(services.DB),
    "``pgbouncer`` restarted while messages flow": lambda: restart(services.POOLER),
    "``odoo`` restarted while messages flow": lambda: restart(ODOO),
    "healthcheck, threaded": without_addon,
    "two replicas, threaded": lambda: replicas(0),
    "two replicas, ``WORKERS=2``": lambda: replicas(2),
    "healthcheck, ``WORKERS=2``": silent_gevent,
    "SIGTERM, ``WORKERS=2``": end,
    "read-only root, no capabilities, at most 100 processes; ``PASSWORD_FILE``": confined,
    "two Odoos in a pod; ``PG*`` variables": pod,
    "Job, claim and Deployment of ``kubernetes.yaml``": kubernetes,
}
VERSIONS = {
    "Podman": ["podman", "--version"],
    "podman-compose": ["dpkg-query", "--show", "podman-compose"],
    "PostgreSQL": ["podman", "run", "--rm", "postgres:17", "dpkg-query", "--show", "postgresql-17"],
    "PgBouncer": ["podman", "run", "--rm", "edoburu/pgbouncer", "dpkg-query", "--show", "pgbouncer"],
    "Odoo": ["podman", "run", "--rm", "odoo:19.0", "dpkg-query", "--show", "odoo-19"],
}


def _run_odoo(name, options, variables, *arguments):
    variables = {**variables, "IMDISPATCHER_DB_HOST": "db", "IMDISPATCHER_DB_PORT": "5432"}
    options = [
        *options,
        *("--env=%s=%s" % pair for pair in variables.items()),
        "--volume=%s_odoo:/var/lib/odoo" % services.PROJECT,
    ]
    load = "--load=base,rpc,web,bus_alt_connection"
    podman("run", "--detach", "--name=" + name, *options, services.IMAGE, "odoo", load, *arguments)


def _serves():
    with http_session() as session:
        try:
            return session.get("http://127.0.0.1:8069/web/health", timeout=5).ok
        except OSError:
            return False


def _is_healthy():
    """Run the container's healthcheck, as systemd would do for Podman."""
    try:
        podman("healthcheck", "run", ODOO)
    except CommandError:
        return False
    return True


def _expect(well, when):
    if well != [True, False, True]:
        raise RuntimeError("the healthcheck passed before, %s and afterwards: %s" % (when, well))
    return "fails %s, passes before and after" % when


def prepare():
    """Download the systems of the images."""
    if os.geteuid() != 0:
        raise RuntimeError("only root can run these containers")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for image, (packages, *newer) in SYSTEMS.items():
        archive = FOLDER / (image + ".tar")
        if not archive.exists():
            say("%s: making a minimal system ..." % image)
            unfinished = FOLDER / "unfinished.tar"
            make_system("trixie", packages, unfinished, *newer)
            unfinished.rename(archive)


def make_system(suite, packages, target, newer=None):
    """Make a tar file of a minimal system of a suite of Debian with these packages, separated by commas.

    :param newer: another suite, of which to take those that the first does not have
    """
    command = minimal_system(packages, FOLDER / "apt.conf")
    if newer:
        command.append('--aptopt=APT::Default-Release "%s";' % suite)
    mirror = find_mirror()
    run([*command, suite, target, *("deb %s %s main" % (mirror, each) for each in (suite, newer) if each)])


def try_all():
    """Run the trials up to the first that fails; write the table if none does."""
    rows = []
    for what, trial in TRIALS.items():
        rows.append([what, trial()])
        say("%s: %s" % tuple(rows[-1]))
    versions = ["%s %s" % (name, run(command).split()[-1]) for name, command in VERSIONS.items()]
    text = "Run on %s by ``make containers``, with %s:\n\n%s\n" % (
        datetime.date.today(),
        ", ".join(versions),
        tabulate(rows, headers=["what", "result"], tablefmt="rst", disable_numparse=True),
    )
    DOCUMENT.write_text(text)
    print("Written to docs/%s." % DOCUMENT.name)


def main():
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if sys.argv[1:] == ["inside"]:
            try_all()
            return 0
        prepare()
        script = ["bash", HERE / "run.sh", FOLDER, sys.executable, "-m", "tools.containers", "inside"]
        # Ends with us, if only by force: unshare ignores SIGTERM.
        return subprocess.run(script).returncode
    except (RuntimeError, OSError) as error:
        print("make containers: %s (logs of containers: %s)" % (reason(error), FOLDER / "logs"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
