"""pip install ./setup/bus_alt_connection

Makes what ``pyproject.toml`` in the folder of the addon does, in the layout of OCA's repositories and with any Python
and setuptools that Odoo 12.0 may have. setuptools-odoo is not used for the reason given there.
"""

import ast
import os

from setuptools import setup

ADDON = "odoo/addons/bus_alt_connection"


def read(name):
    path = os.path.join(ADDON, name)
    if not os.path.exists(path):
        raise SystemExit(
            "%s is not there: its folder is a link to that of the addon, which needs a whole clone, and pip 21.3 to be "
            "followed; with an older one: pip install git+file://<clone>#subdirectory=setup/bus_alt_connection" % path
        )
    with open(path, encoding="utf-8") as file:
        return file.read()


manifest = ast.literal_eval(read("__manifest__.py"))

setup(
    name="bus-alt-connection",
    version=manifest["version"],
    description=manifest["summary"],
    long_description=read("README.rst"),
    long_description_content_type="text/x-rst",
    license="AGPL-3.0-or-later",
    author=manifest["author"],
    classifiers=["Framework :: Odoo"],
    python_requires=">=3.5",
    packages=[ADDON.replace("/", ".")],
    package_data={"": ["LICENSE", "README.rst", "readme/*", "static/description/*"]},
    zip_safe=False,
)
