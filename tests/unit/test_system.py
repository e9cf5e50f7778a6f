"""What has to be installed is told all at once, to those who have to do it themselves."""

import sys

import pytest

from stack import system


@pytest.fixture
def installed(monkeypatch):
    """The packages that a Debian has, on which we may not install any; changed by tests."""
    installed = {"fonts-liberation"}
    monkeypatch.setattr(system, "is_installed", installed.__contains__)
    monkeypatch.setattr(system, "_PROGRAMS", {})
    monkeypatch.setattr(system, "_is_debian", lambda: True)
    monkeypatch.setattr(system.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(system.shutil, "which", {"apt-get": "/usr/bin/apt-get"}.get)
    return installed


def refusal(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["system", *arguments])
    with pytest.raises(SystemExit) as caught:
        system.main()
    return str(caught.value)


LATER = ["--later", "chromium", "fonts-liberation"]


def test_one_refusal_names_all_packages(installed, monkeypatch):
    assert refusal(monkeypatch, "postgresql", "pgbouncer", *LATER) == (
        "not root, and no sudo without password; run as root: "
        "apt-get update && apt-get install --no-install-recommends postgresql pgbouncer chromium"
    )


def test_what_is_there_is_not_named_nor_what_only_debian_has(installed, monkeypatch):
    installed.add("postgresql")
    monkeypatch.setattr(system, "_is_debian", lambda: False)
    assert refusal(monkeypatch, "postgresql", "pgbouncer", *LATER).endswith(" pgbouncer")


def test_what_is_not_wanted_yet_holds_nobody_up(installed, monkeypatch):
    installed.update(["postgresql", "pgbouncer"])
    monkeypatch.setattr(sys, "argv", ["system", "postgresql", "pgbouncer", *LATER])
    system.main()


def test_a_program_counts_without_the_package(installed, monkeypatch):
    monkeypatch.setattr(system, "_PROGRAMS", {"pgbouncer": lambda: "/usr/local/bin/pgbouncer"})
    system.ensure_packages("pgbouncer")
