"""The files and settings that docs/ gives to those who deploy are what their programs, and we, accept."""

import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from bus_alt_connection import settings
from stack.odoo import default_load

PROJECT = Path(__file__).resolve().parents[2]
KUBERNETES = PROJECT / "docs" / "kubernetes.yaml"
TEXTS = [PROJECT / "README.rst", *sorted(PROJECT.glob("docs/*.rst")), *sorted(PROJECT.glob("bus_alt_connection/*.rst"))]
#: how Odoo is to be started
LOAD = "--load=%s,bus_alt_connection" % default_load("19.0")


def direct_address(environment):
    """Return the address that the listeners get from these variables."""
    found = settings.read({name: value for name, value in environment.items() if value}, {})
    assert found.errors == found.warnings == []
    return settings.address(found.connection)


def test_compose_sends_the_listeners_to_the_server_and_the_rest_to_the_pooler():
    odoo = yaml.safe_load((PROJECT / "demo" / "compose.yaml").read_text())["services"]["odoo"]
    assert direct_address(odoo["environment"]) == "db:5432"
    assert "%(HOST)s:%(PORT)s" % odoo["environment"] == "pgbouncer:6432"
    assert LOAD in odoo["command"]


def test_kubernetes_takes_our_objects():
    checked = [one for one in _kubernetes() if not one["apiVersion"].startswith("postgresql.cnpg.io/")]
    assert {one["kind"] for one in checked} == {"Deployment", "Job", "PersistentVolumeClaim", "Service"}
    for one in checked:
        kubernetes_validate.validate(one, desired_version="1.31", strict=True)


def test_kubernetes_sends_the_listeners_to_the_primary_and_the_rest_to_the_pooler():
    names = {one["kind"]: one["metadata"]["name"] for one in _kubernetes()}
    (deployment,) = (one for one in _kubernetes() if one["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    environment = {one["name"]: one.get("value") for one in container["env"]}
    assert direct_address(environment) == names["Cluster"] + "-rw:5432"
    assert environment["HOST"] == names["Pooler"]
    assert LOAD in container["args"]
    # Of a prefork Odoo the gevent process listens.
    assert container["readinessProbe"]["httpGet"]["port"] == "gevent"


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_options_shown_in_a_text_are_options(path):
    shown = re.findall(r"\b((?:ODOO_)?IMDISPATCHER_\w+)=([^\s`]+)", path.read_text())
    for name, value in shown:
        assert settings.read({name: value}, {}).errors == []


def _kubernetes():
    return list(yaml.safe_load_all(KUBERNETES.read_text()))
