"""Many websocket clients in a process of their own, so that they take no time from those who send and measure.

:class:`Crowd` is the side that measures; ``python -m benchmarks.crowd`` is the other one, which it starts.
"""

import asyncio
import itertools
import json
import sys
import time

import websockets

from . import child

#: all clients are subscribed to it; beside it client 7 has "one-7"
EVERYBODY = "everybody"
# Odoo has to answer so many logins at the same time.
_AT_ONCE = 10
_OPEN_TIMEOUT = 60


class Crowd(child.Child):
    """Up to ``count`` clients of the bus of ``stack``; ``connected`` says how many there are.

    A message is received as ``{"message": ..., "at": [monotonic second of each receipt]}``.
    """

    def __init__(self, stack, count):
        # All are the same user in the same session, as the tabs of one browser are.
        with stack.client([], listening=False) as client:
            session = client._session_id
        super().__init__("crowd")
        query = "?version=" + stack.build.websocket_version if stack.build.websocket_version else ""
        answer = self.ask(
            {
                "url": "ws%s/websocket%s" % (stack.odoo.event_url[4:], query),
                "origin": stack.odoo.event_url,
                "session": session,
                "count": count,
                "last": stack.last_id(),
            }
        )
        self.connected = answer["connected"]
        self.seconds = answer["seconds"]
        self.problems = answer["problems"]

    def receive(self, count, deadline):
        """Wait for ``count`` receipts since the last call, ``deadline`` seconds at most.

        Returns a dictionary: message -> monotonic seconds of each receipt.
        """
        answer = self.ask({"receive": count, "deadline": deadline})
        self.problems = answer["problems"]
        return dict(answer["received"])


class _Clients:
    def __init__(self):
        self.received = {}
        self.count = 0
        self.problems = []
        self.news = asyncio.Event()
        self._numbers = itertools.count()
        self._readers = []

    async def connect(self, url, origin, session, count, last):
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one(number):
            async with gate:
                try:
                    socket = await websockets.connect(
                        url,
                        origin=origin,
                        additional_headers={"Cookie": "session_id=" + session},
                        compression=None,
                        ping_interval=None,
                        max_size=None,
                        open_timeout=_OPEN_TIMEOUT,
                        proxy=None,
                    )
                    channels = [EVERYBODY, "one-%d" % number]
                    subscription = {"channels": channels, "last": last}
                    await socket.send(json.dumps({"event_name": "subscribe", "data": subscription}))
                    # Odoo answers when it has done what the last frame asked for.
                    await asyncio.wait_for(await socket.ping(), _OPEN_TIMEOUT)
                except (OSError, asyncio.TimeoutError, websockets.WebSocketException) as error:
                    self.problems.append("not connected: %s: %s" % (type(error).__name__, error))
                    return False
            self._readers.append(asyncio.ensure_future(self._read(socket)))
            return True

        return sum(await asyncio.gather(*map(one, range(count))))

    async def _read(self, socket):
        try:
            async for text in socket:
                at = time.monotonic()
                for notification in json.loads(text):
                    self.received.setdefault(notification["message"]["payload"], []).append(at)
                    self.count += 1
                self.news.set()
        except websockets.WebSocketException as error:
            self.problems.append("closed: %s" % error)
        self.problems.append("closed by the server")

    async def receive(self, count, deadline):
        end = time.monotonic() + deadline
        while self.count < count:
            self.news.clear()
            try:
                await asyncio.wait_for(self.news.wait(), max(end - time.monotonic(), 0.001))
            except asyncio.TimeoutError:
                break
        # As pairs: JSON would make texts of the numbers.
        received, self.received, self.count = list(self.received.items()), {}, 0
        return received


async def _serve():
    loop = asyncio.get_running_loop()
    clients = _Clients()
    while True:
        line = await loop.run_in_executor(None, sys.stdin.readline)
        if not line:
            return
        question = json.loads(line)
        if "url" in question:
            began = time.monotonic()
            answer = {"connected": await clients.connect(**question), "seconds": time.monotonic() - began}
        else:
            answer = {"received": await clients.receive(question["receive"], question["deadline"])}
        child.answer({**answer, "problems": sorted(set(clients.problems))[:5]})


if __name__ == "__main__":
    asyncio.run(_serve())
