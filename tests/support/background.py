"""Tests that take long, though they do next to nothing, run while the other tests of their module do.

Such a module imports both names of this one.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest


def in_background(function):
    """Make a test of ``function``, which begins with its module and runs beside it.

    :param function: is given an event, which is set when nobody waits for it any more
    """

    def test(background):
        background(function)

    test.__name__ = function.__name__
    test.beside = function
    return test


@pytest.fixture(scope="module", autouse=True)
def background(request):
    stop = threading.Event()
    wanted = {item.originalname for item in request.session.items if item.module is request.module}
    waits = [one.beside for one in vars(request.module).values() if hasattr(one, "beside")]
    with ThreadPoolExecutor(len(waits)) as executor:
        running = {function: executor.submit(function, stop) for function in waits if function.__name__ in wanted}
        yield lambda function: running[function].result()
        stop.set()
