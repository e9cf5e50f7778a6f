"""Which packages another version of PostgreSQL is put together from."""

import pytest

from stack import debian, servers


@pytest.mark.parametrize("name", ["libc6", "libpq5", "libssl3t64", "libgssapi-krb5-2", "zlib1g", "libxml2-16"])
def test_the_libraries_that_programs_load_are_fetched(name):
    assert debian._LIBRARY.fullmatch(name)


@pytest.mark.parametrize(
    "name", ["libperl5.42", "libjson-perl", "libllvm19", "libz3-4", "libc-bin", "locales", "perl-base", "postgresql-18"]
)
def test_what_they_do_not_load_is_not_fetched(name):
    assert not debian._LIBRARY.fullmatch(name)


def test_a_version_that_debian_does_not_have_is_refused():
    with pytest.raises(RuntimeError, match="PostgreSQL 9"):
        servers.server_programs("9")
