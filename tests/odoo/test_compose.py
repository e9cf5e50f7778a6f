"""demo/compose.yaml is what Docker Compose accepts, and says how to deploy the addon."""

import json
import subprocess
from pathlib import Path

import pytest

from stack.archive import CACHE, locked
from stack.debian import unpack_packages
from stack.stack import ADDON
from tests.support.deployment import LOAD, direct_address

COMPOSE = ADDON / "demo" / "compose.yaml"


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
    assert direct_address(environment) == "db:5432"
    assert "%(HOST)s:%(PORT)s" % environment == "pgbouncer:6432"
    assert {"db", "pgbouncer"} < set(compose)
    assert LOAD in compose["odoo"]["command"]
