"""A source tree is taken for what it is, and what is none, or not a whole one, is named in one line."""

import shutil

import pytest

from stack.trees import read_tree
from tests.support.trees import add_modules, make_tree


def test_a_clone_has_its_modules_in_addons(tmp_path):
    tree = read_tree(make_tree(tmp_path, "15.0"))
    assert tree == (tmp_path, "15.0", "15.0", [tmp_path / "addons"], tmp_path / "addons" / "bus")


def test_an_archive_has_all_modules_where_odoo_looks_by_itself(tmp_path):
    tree = read_tree(make_tree(tmp_path, "15.0", "15.0-20221019", addons="odoo/addons"))
    assert tree == (tmp_path, "15.0", "15.0-20221019", [], tmp_path / "odoo" / "addons" / "bus")


def test_an_empty_folder_addons_is_not_where_the_modules_are(tmp_path):
    tree = make_tree(tmp_path, addons="odoo/addons")
    (tree / "addons" / "bus").mkdir(parents=True)
    assert read_tree(tree)[3:] == ([], tree / "odoo" / "addons" / "bus")


def test_with_modules_in_both_folders_both_are_searched(tmp_path):
    tree = make_tree(tmp_path, addons="odoo/addons")
    add_modules(tree / "addons", "web")
    assert read_tree(tree)[3:] == ([tree / "addons"], tree / "odoo" / "addons" / "bus")
    # Odoo takes the first on its path.
    add_modules(tree / "addons", "bus")
    assert read_tree(tree)[3:] == ([tree / "addons"], tree / "addons" / "bus")


def test_modules_are_found_if_odoo_addons_is_the_empty_one(tmp_path):
    tree = make_tree(tmp_path)
    shutil.rmtree(tree / "odoo" / "addons")
    (tree / "odoo" / "addons").mkdir()
    add_modules(tree / "addons", "base")
    assert read_tree(tree)[3:] == ([tree / "addons"], tree / "addons" / "bus")


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("odoo-bin", "no source tree of Odoo: it has no odoo-bin or no odoo/release.py"),
        ("odoo/release.py", "no source tree of Odoo: it has no odoo-bin or no odoo/release.py"),
        ("addons", "there is no web/__manifest__.py in its addons, nor in its odoo/addons"),
        ("addons/bus", "there is no bus/models/bus.py in its addons, nor in its odoo/addons"),
        ("odoo/addons", "there is no base/__manifest__.py in its addons, nor in its odoo/addons"),
    ],
)
def test_what_is_missing_is_named_in_one_line(tmp_path, missing, said):
    path = make_tree(tmp_path) / missing
    if path.is_dir():
        shutil.rmtree(path)
        path.mkdir()
    else:
        path.unlink()
    assert refusal(tmp_path).startswith("%s is no " % tmp_path)
    assert refusal(tmp_path).endswith(said)


@pytest.mark.parametrize(
    ("release", "said"),
    [
        (b"<<<<<<< HEAD\n", "SyntaxError: invalid syntax"),
        (b"\x00\xff", ""),
        (b"version = '15.0'\n", "KeyError: 'series'"),
        (b"series = 15.0\n", "AttributeError: "),
        (b"import nowhere\n", "ModuleNotFoundError: No module named 'nowhere'"),
        (b"raise SystemExit('two\\nlines')\n", "SystemExit: two lines"),
    ],
)
def test_a_release_that_is_none_is_named_in_one_line(tmp_path, release, said):
    path = make_tree(tmp_path) / "odoo" / "release.py"
    path.write_bytes(release)
    assert refusal(tmp_path).startswith("%s tells no series of Odoo: %s" % (path, said))


def refusal(tree):
    with pytest.raises(RuntimeError) as refused:
        read_tree(tree)
    assert "\n" not in str(refused.value)
    return str(refused.value)
