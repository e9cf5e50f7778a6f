"""The modules of the addon do not import in circles, and its manual says what its log does."""

import ast
import itertools
import re
from pathlib import Path

import pytest
from psycopg2 import extensions

from bus_alt_connection import settings

ADDON = Path(__file__).resolve().parents[2] / "bus_alt_connection"
MANUAL = ADDON / "readme" / "USAGE.rst"
SOURCES = {path.stem: path.read_text() for path in sorted(ADDON.glob("*.py"))}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def nodes(tree, kind):
    return [node for node in ast.walk(tree) if isinstance(node, kind)]


def test_what_is_looked_at_is_there():
    assert {"patch", "listener", "settings"} <= set(SOURCES)
    assert len(listed()) > 10
    assert len(logged()) > 10
    assert len(_of_settings()) == len(_WRONG)


# Imports --------------------------------------------------------------------------------------------------------------


def imports(name):
    """Return the modules of the addon that a module imports, wherever in it."""
    found = set()
    for node in nodes(TREES[name], (ast.Import, ast.ImportFrom)):
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level < 2
            package = ("bus_alt_connection." * node.level + (node.module or "")).rstrip(".")
            names = [package + "." + name for name in names] if package == "bus_alt_connection" else [package]
        found.update(one.split(".")[1] for one in names if one.startswith("bus_alt_connection."))
    return found & set(SOURCES)


def test_imports_are_found():
    assert {"connection", "settings"} <= imports("patch")
    assert {"connection", "settings"} <= imports("check")


def test_there_is_no_circle_among_the_imports():
    left = {name: imports(name) for name in SOURCES}
    while left:
        free = [name for name in left if not left[name] & set(left)]
        assert free, "a circle among, or above: %s" % left
        for name in free:
            del left[name]


# Docstrings -----------------------------------------------------------------------------------------------------------

#: what psycopg2 has as well, and ours does the same
_PSYCOPG2 = set(dir(extensions.connection)) | set(dir(extensions.cursor)) | {"connection", "fileno"}


def undocumented():
    """Yield what is public, is not of two lines that say it all, and has no docstring."""
    documented = {node.name for tree in TREES.values() for node in nodes(tree, FUNCTIONS) if ast.get_docstring(node)}
    for name, tree in TREES.items():
        if name not in ("__init__", "__manifest__") and not ast.get_docstring(tree):
            yield name
        for node in tree.body:
            if not isinstance(node, (ast.ClassDef, *FUNCTIONS)) or node.name.startswith("_"):
                continue
            if not ast.get_docstring(node) and not _is_controller(node):
                yield "%s.%s" % (name, node.name)
            for method in node.body if isinstance(node, ast.ClassDef) else []:
                if not isinstance(method, FUNCTIONS) or method.name.startswith("_") or ast.get_docstring(method):
                    continue
                # One that takes the place of another means what that says.
                if method.name not in _PSYCOPG2 | documented:
                    yield "%s.%s.%s" % (name, node.name, method.name)


def _is_controller(node):
    # Its one method says it.
    return isinstance(node, ast.ClassDef) and ["http.Controller"] == [ast.unparse(base) for base in node.bases]


def test_what_is_public_says_what_it_does():
    assert list(undocumented()) == []


# The log --------------------------------------------------------------------------------------------------------------

_PLACEHOLDER = re.compile(r"%[-+ #0-9.]*[a-zA-Z]")
# What is in the manual in place of a value: of it the log has something else each time.
_VALUE = re.compile(r"\.\.\.|\?$|\b\d+\b|IMDISPATCHER_[A-Z_]*")


def logged(levels=("info", "warning", "error", "log")):
    """Return the sentences of the log, by module, as they are in the code: with placeholders."""
    found = set()
    for module, tree in TREES.items():
        for function in nodes(tree, FUNCTIONS):
            for call in nodes(function, ast.Call):
                target = ast.unparse(call.func)
                # The listener's thread leaves writing to another one, see Listener._warn.
                level = "warning" if target in ("warn", "self._warn") else target.rpartition("logger.")[2]
                if level not in levels:
                    continue
                template, *values = call.args[1:] if level == "log" else call.args
                for sentence in _texts(template, function):
                    # One that is only a placeholder is said by somebody else: see _of_settings.
                    if re.search("[a-z]{3}", _PLACEHOLDER.sub("", sentence)):
                        found.update((module, one) for one in _with_words(sentence, values, function))
    return found


def _texts(node, function):
    """Return what a template may be: a constant, or what its function gives a variable."""
    if isinstance(node, ast.Constant):
        return [node.value]
    if not isinstance(node, ast.Name):
        return [text for child in ast.iter_child_nodes(node) for text in _texts(child, function)]
    texts = []
    for statement in nodes(function, (ast.Assign, ast.AugAssign)):
        if isinstance(statement, ast.AugAssign):
            if ast.unparse(statement.target) == node.id:
                texts[-1] += statement.value.value
            continue
        target, value = statement.targets[0], statement.value
        pairs = zip(target.elts, value.elts) if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) else ()
        for one, given in [(target, value), *pairs]:
            if ast.unparse(one) == node.id:
                texts += [constant.value for constant in nodes(given, ast.Constant) if isinstance(constant.value, str)]
    assert texts, "where does %s of %s come from?" % (node.id, function.name)
    return texts


def _with_words(sentence, values, function):
    """Return it with its words: such as may be there, or not, " again", or each of two, "at" and "through"."""
    assigned = {ast.unparse(one.targets[0]): one.value for one in nodes(function, ast.Assign) if len(one.targets) == 1}
    words = []
    for value in _flat(values, assigned):
        choice = assigned.get(ast.unparse(value), value)
        arms = [choice.body, choice.orelse] if isinstance(choice, ast.IfExp) else []
        words.append(
            [arm.value for arm in arms if isinstance(arm, ast.Constant) and isinstance(arm.value, str)] or [None]
        )
    found = []
    for chosen in map(iter, itertools.product(*words)):
        found.append(_PLACEHOLDER.sub(lambda place, chosen=chosen: next(chosen, None) or place[0], sentence))
    return found


def _flat(values, assigned):
    """Yield values, and those of tuples that are put in with a star; not what follows any other star."""
    for value in values:
        if isinstance(value, ast.Starred):
            given = assigned.get(ast.unparse(value.value))
            if not isinstance(given, ast.Tuple):
                return
            yield from _flat(given.elts, assigned)
        else:
            yield value


_WRONG = {
    "DB_HOTS": "a",
    "DB_XYZZY": "a",
    "DB_HOST": "a@b",
    "DB_HOSTADDR": "192.0.2.1:5432",
    "DB_SERVICE_HOST": "192.0.2.1",
    "DB_USER": "postgresql://a",
    "DB_SSLMODE": "verify_full",
    "DB_CONNECT_TIMEOUT": "soon",
    "CHECK_INTERVAL": "soon",
    "SHARE": "perhaps",
    # Which differs from the one in the other spelling.
    "DB_PORT": "1",
    # Which differs from Odoo's own option.
    "DB_DBNAME": "a",
}


def _of_settings():
    """Return what settings find wrong, of each kind."""
    environ = {"IMDISPATCHER_" + name: value for name, value in _WRONG.items()}
    found = settings.read({**environ, "ODOO_IMDISPATCHER_DB_PORT": "2"}, {}, "b")
    return found.errors + found.warnings


def listed():
    """Return the sentences that the manual lists: whatever is quoted there and is of several words."""
    section = re.search(r"^What the log says\n~+\n(.*?)\n\n[^\n]+\n~~~", MANUAL.read_text(), re.DOTALL | re.MULTILINE)[
        1
    ]
    quoted = [re.sub(r"\s+", " ", one) for one in re.findall(r"``(.+?)``", section, re.DOTALL)]
    return [one for one in quoted if " " in one]


def says(sentence, text):
    """Return whether ``text``, of the log, is what a ``sentence`` of the manual is about."""
    pattern = ".*".join(map(re.escape, _VALUE.split(sentence)))
    return re.search(pattern, _PLACEHOLDER.sub("", text), re.DOTALL)


def texts():
    """Return the sentences of the log, with and without the words that are not always there."""
    found = {sentence for _module, sentence in logged()}
    return sorted(found | {sentence.replace(" again", "", 1) for sentence in found}) + _of_settings()


@pytest.mark.parametrize("sentence", listed())
def test_what_the_manual_lists_is_in_the_log(sentence):
    assert [text for text in texts() if says(sentence, text)]


@pytest.mark.parametrize(
    "text", sorted(sentence for _module, sentence in logged(("warning", "error", "log"))) + _of_settings()
)
def test_what_an_operator_has_to_look_at_is_in_the_manual(text):
    assert [sentence for sentence in listed() if says(sentence, text)]


def test_the_lines_in_the_docstring_of_patch_are_in_the_log():
    docstring = ast.get_docstring(TREES["patch"])
    lines = [line.strip() for line in docstring[docstring.index("the log has::") :].splitlines()[1:] if line.strip()]
    assert len(lines) > 1
    templates = {sentence.replace(" again", "", 1) for _module, sentence in logged()}
    for line in lines:
        patterns = [".*".join(map(re.escape, _PLACEHOLDER.split(template))) for template in templates]
        assert [one for one in patterns if re.fullmatch(one, line)], line


def test_the_lines_of_the_log_that_the_manual_shows_are_in_the_log():
    shown = re.findall(
        r"^ +(?:INFO|WARNING|ERROR) \S+ odoo\.addons\.bus_alt_connection\.(\w+): (.*)", MANUAL.read_text(), re.M
    )
    assert shown
    for module, line in shown:
        templates = {sentence.replace(" again", "", 1) for name, sentence in logged() if name == module}
        patterns = [".*".join(map(re.escape, _PLACEHOLDER.split(template))) for template in templates]
        assert [one for one in patterns if re.fullmatch(one, line)], line
