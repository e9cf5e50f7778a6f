"""Check that files keep to the grammar of an old Python, one that need not be installed.

    python -m tools.syntax 3.5 FOLDER

prints what is not in the grammar, and ends with exit code 1 if there is anything.
"""

import sys
from pathlib import Path

import parso


def syntax_errors(version, path):
    """Return what the Python of this version would not understand in a file, as lines for people."""
    grammar = parso.load_grammar(version=version)
    errors = grammar.iter_errors(grammar.parse(path.read_text(encoding="utf-8")))
    return ["%s:%s: Python %s: %s" % (path, error.start_pos[0], version, error.message) for error in errors]


def main():
    version, folder = sys.argv[1:]
    errors = [error for path in sorted(Path(folder).rglob("*.py")) for error in syntax_errors(version, path)]
    print("\n".join(errors) or "All files keep to the grammar of Python %s" % version)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
