"""Make the addon's README.rst and static/description/index.html from the fragments in its folder readme/.

    python -m tools.readme [--check]

writes them, or with ``--check`` only ends with exit code 1 if they are not what the fragments say. The fragments and
their order are those of OCA's oca-gen-addon-readme. That is on no package index, and links what it makes to a
repository on GitHub, as does what is there and derived from it.
"""

import ast
import sys
from pathlib import Path

from docutils.core import publish_string
from docutils.utils import SystemMessage

PROJECT = Path(__file__).resolve().parents[1]
ADDON = PROJECT / "bus_alt_connection"
STYLE = PROJECT / "docs" / "index.css"
README = ADDON / "README.rst"
INDEX = ADDON / "static" / "description" / "index.html"

#: fragment -> the title of its section; their own titles are underlined with "~"
SECTIONS = {
    "INSTALL": "Installation",
    "CONFIGURE": "Configuration",
    "USAGE": "Usage",
    "ROADMAP": "Known issues",
}
CREDITS = {"CONTRIBUTORS": "Contributors", "CREDITS": "Other credits"}

_HEAD = """\
{bar}
{title}
{bar}

..
   Made by "make readme" from the fragments in readme/. Changes of this file will be lost.

{description}
.. contents::
   :local:
   :depth: 2
"""
# As seen from the folder readme/, where they show when a fragment is read by itself.
_IMAGES = "../static/description/"


def readme():
    """Return the text of README.rst."""
    manifest = ast.literal_eval((ADDON / "__manifest__.py").read_text(encoding="utf-8"))
    title = manifest["name"]
    parts = [_HEAD.format(bar="=" * len(title), title=title, description=_fragment("DESCRIPTION"))]
    parts += [_section(title, "=", _fragment(name)) for name, title in SECTIONS.items()]
    authors = "".join("- %s\n" % author.strip() for author in manifest["author"].split(","))
    parts.append(_section("Credits", "=", _section("Authors", "~", authors)))
    parts += [_section(title, "~", _fragment(name)) for name, title in CREDITS.items()]
    return "\n".join(parts).replace(_IMAGES, "static/description/")


def index(text):
    """Return the text of index.html for a README.rst; any fault in that raises ``SystemMessage``."""
    settings = {
        "halt_level": 2,
        "report_level": 2,
        "input_encoding": "unicode",
        "output_encoding": "utf-8",
        "stylesheet_path": str(STYLE),
        "embed_stylesheet": True,
        "syntax_highlight": "none",
        "toc_backlinks": False,
        # Odoo 19.0 decodes the page before lxml reads it, which then takes none.
        "xml_declaration": False,
        "_disable_config": True,
    }
    # Odoo takes images to be beside the page.
    text = text.replace("image:: static/description/", "image:: ")
    return publish_string(text, str(README), writer_name="html4css1", settings_overrides=settings).decode()


def _fragment(name):
    return (ADDON / "readme" / (name + ".rst")).read_text(encoding="utf-8").strip("\n") + "\n"


def _section(title, line, text):
    return "%s\n%s\n\n%s" % (title, line * len(title), text)


def main():
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit("usage: python -m tools.readme [--check]")
    text = readme()
    try:
        made = {README: text, INDEX: index(text)}
    except SystemMessage as error:
        sys.exit("the fragments can't be put together: %s" % error)
    stale = [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    names = ", ".join(str(path.relative_to(PROJECT)) for path in stale)
    if sys.argv[1:]:
        sys.exit("not what the fragments say: %s; run make readme" % names if stale else None)
    for path in stale:
        path.write_text(made[path], encoding="utf-8")
    print("made %s" % names if stale else "nothing has changed")


if __name__ == "__main__":
    main()
