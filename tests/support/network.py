"""A network that can be unplugged, where the machine allows it."""

import contextlib

import pytest

from stack.namespaces import Network, Unavailable


@contextlib.contextmanager
def network():
    try:
        with Network() as network, network.near():
            yield network
    except Unavailable as error:
        pytest.skip(str(error))
