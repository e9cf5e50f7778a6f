"""The manual lists what the addon's log says, and the addon keeps to what its users and the simulation rely on."""

import ast
import functools
import re
from pathlib import Path

import parso

from bus_alt_connection import settings

PROJECT = Path(__file__).resolve().parents[2]
ADDON = PROJECT / "bus_alt_connection"
MANUAL = (ADDON / "readme" / "USAGE.rst").read_text()
TREES = {path.stem: ast.parse(path.read_text()) for path in sorted(ADDON.glob("*.py"))}

_PLACEHOLDER = re.compile(r"%[-+ #0-9.]*[a-zA-Z]")
# What the log has something else for each time: values, and words that are not always there.
_VALUE = re.compile(r"\.\.\.|\?$|\b\d+\b|IMDISPATCHER_[A-Z_]*|\b(?:again|at|through)\b")


def nodes(tree, kind):
    return [node for node in ast.walk(tree) if isinstance(node, kind)]


@functools.cache
def logged(*levels):
    """Return pairs for the lines of the log at ``levels``: module, and text with placeholders."""
    found = set()
    for module, tree in TREES.items():
        for function in nodes(tree, ast.FunctionDef):
            for call in nodes(function, ast.Call):
                # Supervisor._log is given the function that writes the line, and its arguments.
                function_and_arguments = call.args if ast.unparse(call.func) == "self._log" else [call.func, *call.args]
                target, arguments = ast.unparse(function_and_arguments[0]), function_and_arguments[1:]
                # The listener's thread leaves writing to another one, see Listener._warn.
                level = "warning" if target in ("warn", "self._warn") else target.rpartition("logger.")[2]
                if level in levels:
                    template = arguments[1 if level == "log" else 0]
                    found.update((module, text) for text in _texts(template, function))
    # What is only a placeholder is said by somebody else: see _of_settings.
    return {(module, text) for module, text in found if re.search("[a-z]{3}", _PLACEHOLDER.sub("", text))}


def _texts(template, function):
    """Return the texts that a template may be: those of constants in it, or what ``function`` assigns to its name."""
    if isinstance(template, ast.Name):
        texts = []
        for statement in nodes(function, (ast.Assign, ast.AugAssign)):
            target = statement.target if isinstance(statement, ast.AugAssign) else statement.targets[0]
            if ast.unparse(target) != template.id:
                continue
            if isinstance(statement, ast.AugAssign):
                texts[-1] += statement.value.value
            else:
                texts += _texts(statement.value, function)
        assert texts, "where does %s of %s come from?" % (template.id, function.name)
        return texts
    return [one.value for one in nodes(template, ast.Constant) if isinstance(one.value, str)]


_WRONG = {
    "DB_HOTS": "a",
    "DB_XYZZY": "a",
    "DB_HOST": "a@b",
    "DB_HOSTADDR": "192.0.2.1:5432",
    "DB_SERVICE_HOST": "192.0.2.1",
    "DB_SSLMODE": "verify_full",
    "DB_CONNECT_TIMEOUT": "soon",
    "CHECK_INTERVAL": "soon",
    "SHARE": "perhaps",
    # It differs from the one in the other spelling.
    "DB_PORT": "1",
    # It differs from Odoo's own option.
    "DB_DBNAME": "a",
}


def _of_settings():
    """Return what settings find wrong, of each kind."""
    environ = {"IMDISPATCHER_" + name: value for name, value in _WRONG.items()}
    found = settings.read({**environ, "ODOO_IMDISPATCHER_DB_PORT": "2"}, {}, "b")
    assert len(found.errors + found.warnings) == len(_WRONG)
    return found.errors + found.warnings


def listed():
    """Return the sentences that the manual lists: whatever is quoted there and is of several words."""
    (section,) = re.findall(r"^What the log says\n~+\n(.*?)\n\n[^\n]+\n~~~", MANUAL, re.DOTALL | re.MULTILINE)
    quoted = [re.sub(r"\s+", " ", one) for one in re.findall(r"``(.+?)``", section, re.DOTALL)]
    return [one for one in quoted if " " in one]


def says(sentence, text):
    """Return whether ``text``, of the log, is what a ``sentence`` of the manual is about."""
    pattern = ".*".join(re.escape(part.strip()) for part in _VALUE.split(sentence))
    return re.search(pattern, _PLACEHOLDER.sub("", text), re.DOTALL)


def test_what_the_manual_lists_is_in_the_log():
    texts = [text for _module, text in logged("info", "warning", "error", "log")] + _of_settings()
    assert [one for one in listed() if not any(says(one, text) for text in texts)] == []


def test_what_an_operator_has_to_look_at_is_in_the_manual():
    texts = [text for _module, text in logged("warning", "error", "log")] + _of_settings()
    assert len(texts) > 20
    assert [text for text in texts if not any(says(one, text) for one in listed())] == []


def test_the_addon_keeps_to_the_grammar_of_python_3_5():
    grammar = parso.load_grammar(version="3.5")
    for path in ADDON.rglob("*.py"):
        errors = grammar.iter_errors(grammar.parse(path.read_text()))
        assert [(path.name, *error.start_pos, error.message) for error in errors] == []


def test_requirements_name_no_place_to_get_them_from():
    lines = [line for path in PROJECT.glob("tools/requirements/*.txt") for line in path.read_text().splitlines()]
    required = [line.split(" #")[0].split(" ;")[0].strip() for line in lines if line and not line.startswith("#")]
    assert [one for one in required if not re.fullmatch(r"[\w.\[\]-]+(==[\w.]+)?|-[cr] [\w.-]+\.txt", one)] == []
