"""A stack whose listeners reach PostgreSQL on a path that can be made to fail."""

import contextlib

from stack.proxy import Proxy
from stack.stack import Stack


@contextlib.contextmanager
def proxied_stack(series, workers, environment=None, before=None, swallow=False, listening=None, **options):
    """Yield a running :class:`Stack` with ``proxy``, the path of its direct connections.

    :param environment: variables for Odoo besides those that lead through the proxy; or a function as for a Stack,
        which may use ``stack.proxy``
    :param before: ``(host, port)`` that listeners are to try before the proxy
    :param swallow: whether the proxy does that from the beginning
    :param listening: see :class:`Proxy`
    """
    with contextlib.ExitStack() as exits:

        def with_proxy(stack):
            proxy = stack.proxy = exits.enter_context(Proxy((stack.server.host, stack.server.port), listening))
            if swallow:
                proxy.swallow()
            places = [before] if before else []
            hosts, ports = zip(*places, (proxy.host, proxy.port))
            return {
                "IMDISPATCHER_DB_HOST": ",".join(hosts),
                "IMDISPATCHER_DB_PORT": ",".join(map(str, ports)),
                **((environment(stack) if callable(environment) else environment) or {}),
            }

        yield exits.enter_context(Stack(series, workers, environment=with_proxy, **options))
