"""What all tests share: the variants of Odoo that they run on, and stacks of it."""

import contextlib

import pytest

from tests.stack.stack import Stack

#: series and --workers; prefork has the bus in its gevent process
VARIANTS = {
    "14.0-threaded": ("14.0", 0),
    "14.0-prefork": ("14.0", 2),
    "19.0-threaded": ("19.0", 0),
    "19.0-prefork": ("19.0", 2),
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    """Series and number of workers, one variant after the other."""
    return VARIANTS[request.param]


@pytest.fixture(scope="module")
def stack(variant):
    """A stack with our addon, shared by the tests of a module: leave it as it was."""
    series, workers = variant
    with Stack(series, workers) as stack:
        yield stack


@pytest.fixture
def new_stack(variant):
    """Return a function that starts a stack for one test; arguments are those of Stack."""
    series, workers = variant
    with contextlib.ExitStack() as stacks:
        yield lambda **arguments: stacks.enter_context(Stack(series, workers, **arguments))
