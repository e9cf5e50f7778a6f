"""Make the addon's README.rst and static/description/index.html from the fragments in its folder readme/.

    python -m tools.readme [--check]

writes them, or with ``--check`` only ends with exit code 1 if they are not what the fragments say. The fragments and
their order are those of OCA's oca-gen-addon-readme. That is on no package index, and links what it makes to a
repository on GitHub, as does what is there and derived from it.
"""

import sys
from pathlib import Path

from docutils.core import publish_string
from docutils.utils import SystemMessage

PROJECT = Path(__file__).resolve().parents[1]
ADDON = PROJECT / "bus_alt_connection"
#: with the names of fragments in braces; the fragments' own titles are underlined with "~"
TEMPLATE = PROJECT / "tools" / "readme.template"
STYLE = PROJECT / "docs" / "index.css"
README = ADDON / "README.rst"
INDEX = ADDON / "static" / "description" / "index.html"


def readme():
    """Return the text of README.rst."""
    fragments = {path.stem: path.read_text(encoding="utf-8").strip("\n") for path in ADDON.glob("readme/*.rst")}
    # Images show as well when a fragment is read by itself, in its folder.
    return TEMPLATE.read_text(encoding="utf-8").format(**fragments).replace("../static/", "static/")


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
