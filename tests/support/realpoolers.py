"""Poolers of :mod:`stack.poolers`, for tests that do without where they can not be had."""

import pytest


def skip_without(pooler):
    """Skip the test, with the reason, if the program of a class of poolers can not be had."""
    try:
        pooler.program()
    except RuntimeError as error:
        pytest.skip(str(error))
