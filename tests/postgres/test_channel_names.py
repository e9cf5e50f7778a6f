"""PostgreSQL's own idea of a channel's name is that of the addon."""

import contextlib

import pytest

from bus_alt_connection.payload import fold, fold_plain, quote

NAMES = ["imbus", "Orders", "ÄRGER", "İ", "x" * 64, "X" * 62 + "é", "é" * 40, "€" * 30, "😀" * 20, "😀" * 15 + "xyz€"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("written, folded", [(quote, fold), (str, fold_plain)], ids=["quoted", "unquoted"])
def test_listen_folds_a_name_as_the_addon_does(server, name, written, folded):
    with contextlib.closing(server.connect()) as connection, connection.cursor() as cursor:
        cursor.execute("LISTEN %s" % written(name))
        connection.commit()
        cursor.execute("SELECT pg_listening_channels()")
        assert cursor.fetchall() == [(folded(name),)]
