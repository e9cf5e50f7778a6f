"""Stacks with Odoo."""

import contextlib
import functools

import pytest

from stack.builds import find_build
from stack.commands import reason
from stack.stack import Stack
from tests.support.addonlog import wait_until_confirmed
from tests.support.variants import VARIANTS


@pytest.fixture(scope="module")
def variant(request):
    """Series and number of workers, one variant after the other."""
    series, workers = VARIANTS[request.param]
    why_not = _why_not(series)
    if why_not:
        pytest.skip("no Odoo %s: %s" % (series, why_not))
    return series, workers


@functools.cache
def _why_not(series):
    """Return why a series can't be had, None if it can."""
    try:
        find_build(series)
    except RuntimeError as error:
        return reason(error)


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


@pytest.fixture
def client(stack, request):
    """A client with a channel of its own, served by a listener that has heard itself."""
    with stack.client([request.node.originalname]) as client:
        client.channel = request.node.originalname
        wait_until_confirmed(stack)
        yield client
