"""Other people's addons, from PyPI: downloaded when they are first needed, never part of this project."""

import dataclasses
import hashlib
import os
import shutil

from .archive import CACHE, locked
from .commands import CommandError, run, say
from .pythons import REQUIREMENTS

# Packages of addons have them where "pip install" puts them for Odoo to find.
_ADDONS = os.path.join("odoo", "addons")


def with_others(build, name):
    """Return a :class:`~.builds.Build` that has the addons of ``tools/requirements/<name>-<series>.txt`` as well.

    :raise RuntimeError: they can not be had; the message says why, and what to do
    """
    requirements = REQUIREMENTS / ("%s-%s.txt" % (name, build.series))
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()[:10]
    folder = CACHE / ("%s-%s-%s" % (name, build.series, digest))
    with locked(folder.name):
        if not folder.exists():
            _install(build, requirements, folder)
    path = filter(None, [build.env.get("PYTHONPATH"), str(folder)])
    return dataclasses.replace(
        build,
        env={**build.env, "PYTHONPATH": os.pathsep.join(path)},
        addons_paths=[*build.addons_paths, folder / _ADDONS],
        key="%s-%s-%s" % (build.key, name, digest),
    )


def _install(build, requirements, folder):
    say("installing the addons of %s ..." % requirements.stem)
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    pip = [build.command[0], "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    try:
        run([*pip, "--no-deps", "--target", unfinished, "-r", requirements])
    except CommandError as error:
        raise RuntimeError("%s\nThese addons come from PyPI: pip has to reach it, or a mirror" % error) from None
    unfinished.rename(folder)
