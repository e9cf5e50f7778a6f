"""The files and settings that docs/ and demo/ give to those who deploy are what their programs, and we, accept."""

import json
import re
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from bus_alt_connection import settings
from stack.archive import CACHE, locked
from stack.debian import unpack_packages
from stack.odoo import default_load

PROJECT = Path(__file__).resolve().parents[1]
COMPOSE = PROJECT / "demo" / "compose.yaml"
KUBERNETES = PROJECT / "docs" / "kubernetes.yaml"
TEXTS = [PROJECT / "README.rst", *sorted(PROJECT.glob("docs/*.rst")), *sorted(PROJECT.glob("bus_alt_connection/*.rst"))]
LOAD = "--load=%s,bus_alt_connection" % default_load("19.0")


@pytest.fixture(scope="module")
def compose():
    """The services of compose.yaml as Docker Compose understands them; for this it needs no engine."""
    folder = CACHE / "docker-compose"
    with locked(folder.name):
        if not folder.exists():
            unpack_packages("sid", ["docker-compose"], folder)
    program = next(path for path in folder.rglob("docker-compose") if path.is_file())
    done = subprocess.run(
        [program, "-f", COMPOSE, "config", "--format", "json"], capture_output=True, encoding="utf-8", timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)["services"]


def test_docker_compose_takes_our_file_and_finds_what_it_mounts(compose):
    mounted = [mount for service in compose.values() for mount in service["volumes"] if mount["type"] == "bind"]
    assert len(mounted) == 4
    assert all(Path(mount["source"]).exists() for mount in mounted)


def test_compose_sends_the_listeners_to_the_server_and_the_rest_to_the_pooler(compose):
    environment = compose["odoo"]["environment"]
    assert _directly(environment) == "db:5432"
    assert "%(HOST)s:%(PORT)s" % environment == "pgbouncer:6432"
    assert {"db", "pgbouncer"} < set(compose)
    assert LOAD in compose["odoo"]["command"]


def test_kubernetes_takes_our_objects():
    checked = [one for one in _kubernetes() if not one["apiVersion"].startswith("postgresql.cnpg.io/")]
    assert {one["kind"] for one in checked} == {"Deployment", "PersistentVolumeClaim", "Service"}
    for one in checked:
        kubernetes_validate.validate(one, desired_version="1.31", strict=True)


def test_kubernetes_sends_the_listeners_to_the_primary_and_the_rest_to_the_pooler():
    names = {one["kind"]: one["metadata"]["name"] for one in _kubernetes()}
    (deployment,) = (one for one in _kubernetes() if one["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    environment = {one["name"]: one.get("value") for one in container["env"]}
    assert _directly(environment) == names["Cluster"] + "-rw:5432"
    assert environment["HOST"] == names["Pooler"]
    assert LOAD in container["args"]
    # Of a prefork Odoo the gevent process listens.
    assert container["readinessProbe"]["httpGet"]["port"] == "gevent"


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_options_shown_in_a_text_are_options(path):
    shown = re.findall(r"\b((?:ODOO_)?IMDISPATCHER_\w+)=([^\s`]+)", path.read_text())
    for name, value in shown:
        assert settings.read({name: value, settings.HOST_OPTION: "a,b,c"}, {}).errors == []


def _kubernetes():
    return list(yaml.safe_load_all(KUBERNETES.read_text()))


def _directly(environment):
    """Return the address that the listeners get from these variables."""
    found = settings.read({name: value for name, value in environment.items() if value}, {})
    assert found.errors == found.warnings == []
    return settings.address(found.connection)
