"""Other people's addons, from PyPI: downloaded when they are first needed, never part of this project."""

import dataclasses
import hashlib
import os

from .archive import kept
from .commands import run, say
from .pythons import REQUIREMENTS


def with_others(build, name):
    """Return a :class:`~.builds.Build` that has the addons of ``tools/requirements/<name>-<series>.txt`` as well.

    :raise RuntimeError: pip can't install them
    """
    requirements = REQUIREMENTS / ("%s-%s.txt" % (name, build.series))
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()[:10]

    def install(folder):
        say("installing the addons of %s ..." % requirements.stem)
        pip = [build.command[0], "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
        run([*pip, "--no-deps", "--target", folder, "-r", requirements])

    folder = kept("%s-%s-%s" % (name, build.series, digest), install)
    path = os.pathsep.join(filter(None, [build.env.get("PYTHONPATH"), str(folder)]))
    return dataclasses.replace(
        build,
        env={**build.env, "PYTHONPATH": path},
        # Packages of addons have them where "pip install" puts them for Odoo to find.
        addons_paths=[*build.addons_paths, folder / "odoo" / "addons"],
        key="%s-%s-%s" % (build.key, name, digest),
    )
