"""Poolers of :mod:`stack.poolers`, for tests that are skipped where these can't be installed."""

import functools

import pytest

from stack.commands import reason


def skip_without(pooler):
    """Skip the test, with the reason, if the program of a class of poolers can't be installed."""
    why = _why_missing(pooler.program)
    if why:
        pytest.skip(why)


@functools.cache
def _why_missing(program):
    try:
        program()
    except RuntimeError as error:
        return reason(error)
    return None
