"""What belongs to one process stays there, whatever is forked, collected or closed."""

import gc
import os
import types
import weakref

import pytest

from bus_alt_connection import cursor
from bus_alt_connection.cursor import ListeningConnection


def test_a_fork_has_no_listener_yet(odoo, monkeypatch):
    of_parent = odoo.patch._here()
    assert odoo.patch._here() is of_parent
    monkeypatch.setattr(odoo.patch, "os", types.SimpleNamespace(getpid=lambda: os.getpid() + 1))
    assert odoo.patch._here() is not of_parent


def test_to_close_a_copy_in_a_fork_does_not_touch_the_listener(monkeypatch):
    removed = []
    listener = types.SimpleNamespace(listen=lambda feed, channels: None, remove=removed.append)
    copy, original = (ListeningConnection(None, lambda _feed: listener) for _ in range(2))
    for one in (copy, original):
        one.listen([(False, "imbus")])
    original.close()
    monkeypatch.setattr(cursor, "os", types.SimpleNamespace(getpid=lambda: os.getpid() + 1))
    copy.close()
    assert removed == [original]


def test_a_code_that_was_looked_at_is_kept_so_that_no_other_gets_its_place(odoo):
    code = compile("1", "generated", "exec")
    odoo.patch._says_listen(code)
    looked_at = weakref.ref(code)
    del code
    gc.collect()
    assert looked_at() is not None


@pytest.mark.parametrize("evented", [True, False])
def test_only_a_gevent_process_is_a_leader_for_others_of_its_kind(odoo, monkeypatch, evented):
    class Asked(Exception):
        """With the arguments of `sharing.Sharing`."""

    def ask(*arguments):
        raise Asked(*arguments)

    odoo.evented = evented
    odoo.patch.install()
    monkeypatch.setattr(odoo.patch.sharing, "Sharing", ask)
    with pytest.raises(Asked) as asked:
        odoo.patch._start_listening("postgres", None)
    assert asked.value.args[-1] is evented
