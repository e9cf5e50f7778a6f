"""demo/compose.yaml is what Docker Compose accepts, and says how to deploy the addon."""

import json
import subprocess
from pathlib import Path

import pytest

from stack.archive import kept
from stack.debian import unpack_packages
from stack.stack import ADDON
from tests.support.deployment import LOAD, direct_address

COMPOSE = ADDON / "demo" / "compose.yaml"


@pytest.mark.rest
def test_docker_compose_takes_our_file_which_sends_listeners_to_the_server_and_the_rest_to_the_pooler():
    folder = kept("docker-compose", lambda folder: unpack_packages("sid", ["docker-compose"], folder))
    program = next(path for path in folder.rglob("docker-compose") if path.is_file())
    # For this it needs no engine.
    done = subprocess.run(
        [program, "-f", COMPOSE, "config", "--format", "json"], capture_output=True, encoding="utf-8", timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    services = json.loads(done.stdout)["services"]
    builds = [service["build"] for service in services.values() if "build" in service]
    assert {build["target"] for build in builds} == set(services) - {"db"}
    assert all(Path(build["context"], build["dockerfile"]).is_file() for build in builds)
    environment = services["odoo"]["environment"]
    assert direct_address(environment) == "db:5432"
    assert "%(HOST)s:%(PORT)s" % environment == "pgbouncer:6432"
    assert LOAD in services["odoo"]["command"]
