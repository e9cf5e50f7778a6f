"""The parts of ``docs/kubernetes.yaml`` that Podman can play: the Job, the Deployment and the claim."""

import time
from pathlib import Path

import yaml

from stack.commands import run

from . import services
from .services import FOLDER, podman

_SERVER = "odoo-db-rw"


def kubernetes():
    """Play the parts; return what was seen."""
    run(["bash", Path(__file__).with_name("kubernetes.sh"), FOLDER])
    objects = yaml.safe_load_all((FOLDER / "clone" / "docs" / "kubernetes.yaml").read_text())
    by_kind = {each["kind"]: each for each in objects}
    # Podman knows no Jobs, but their pods.
    job = by_kind["Job"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": job["metadata"], "spec": job["spec"]["template"]["spec"]}
    _play(by_kind["PersistentVolumeClaim"], pod)
    first = _wait_for_job()
    podman("pod", "start", "odoo-init")
    second = _wait_for_job()

    deployment = by_kind["Deployment"]
    spec = deployment["spec"]["template"]["spec"]
    # Podman would publish the ports of both replicas on this machine.
    del spec["containers"][0]["ports"]
    # Podman 4.3 can't do without this default of Kubernetes.
    next(volume for volume in spec["volumes"] if "secret" in volume)["secret"]["optional"] = False
    _play(deployment)
    places = [services.address_of_pod("odoo-pod-%d" % number) for number in range(deployment["spec"]["replicas"])]
    odoos = [services.odoo_at(place, event_port=8072) for place in places]
    pooler = {"server": _SERVER, "pooler": "odoo-db-pooler", "port": 5432}
    seen = services.try_out(*odoos, direct=len(odoos), name="odoo-pod-0-odoo", **pooler)
    listener = "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'odoo-listener-%'"
    if services.query("SELECT DISTINCT ssl FROM pg_stat_ssl WHERE pid IN (%s)" % listener, _SERVER) != "t":
        raise RuntimeError("a direct connection is not encrypted")
    return "the Job took %.0f s, its second run %.0f s; %s, over TLS" % (first, second, seen)


def _play(*objects):
    path = FOLDER / "play.yaml"
    path.write_text(yaml.safe_dump_all(objects))
    podman("kube", "play", "--network", services.NETWORK, path)


def _wait_for_job():
    """Wait until the Job's container has ended well; return how many seconds that took."""
    began = time.monotonic()
    code = podman("wait", "odoo-init-init", timeout=600)
    if code != "0":
        raise RuntimeError("exit code %s: %s" % (code, podman("logs", "--tail", "20", "odoo-init-init")))
    return time.monotonic() - began
