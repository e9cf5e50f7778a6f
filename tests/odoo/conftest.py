"""Stacks with Odoo."""

import contextlib

import pytest

from stack.stack import Stack
from tests.support.variants import VARIANTS


@pytest.fixture(scope="module")
def variant(request):
    """Series and number of workers, one variant after the other."""
    return VARIANTS[request.param]


@pytest.fixture(scope="module")
def stack(variant):
    """A stack with our addon, shared by the tests of a module: leave it as it was."""
    series, workers = variant
    # Jobs of Odoo's own have troubles of their own.
    with Stack(series, workers, jobs=False) as stack:
        yield stack


@pytest.fixture
def new_stack(variant):
    """Return a function that starts a stack for one test; arguments are those of Stack."""
    series, workers = variant
    with contextlib.ExitStack() as stacks:
        yield lambda **arguments: stacks.enter_context(Stack(series, workers, **arguments))
