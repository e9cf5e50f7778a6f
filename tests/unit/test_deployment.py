"""The files and settings that docs/ gives to those who deploy are what their programs, and we, accept."""

import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from bus_alt_connection import settings
from tests.support.deployment import LOAD, direct_address

PROJECT = Path(__file__).resolve().parents[2]
KUBERNETES = PROJECT / "docs" / "kubernetes.yaml"
TEXTS = [PROJECT / "README.rst", *sorted(PROJECT.glob("docs/*.rst")), *sorted(PROJECT.glob("bus_alt_connection/*.rst"))]


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
