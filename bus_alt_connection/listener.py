# Copyright 2026 the bus_alt_connection contributors
# License AGPL-3.0 or later (https://www.gnu.org/licenses/agpl).
"""Keep one session that LISTENs, replace it when it is lost, and pass on what it receives.

`Listener.run` is a loop: connect, serve the session until it ends, pause. It guarantees:

- While one session lasts, each notification on a feed's channels is given to that feed once, in the order in which
  the server sends them, from the moment when LISTEN is in force. Those that Odoo can't read are left out, and so
  are those for which the feed has no room.
- A lost session is replaced: at once, unless sessions have been lost very often (see `Backoff`). `supervisor` says what
  happens after a loss, in order. Feeds on channels that catch-up does not cover are told of the gap.
- The loop ends only when the last feed of this process is gone, `close` was called, or Odoo stops.

The supervisor checks whether notifications arrive: it sends a *token*, a notification with a random
payload. A session that has received one is *confirmed*. See `supervisor`.

Locks. A thread that holds one of these locks waits only for locks further down the list:

1. ``patch._Process.lock``: held by one of Odoo's threads during ``patch.install`` and, at the first LISTEN of a cursor,
   during ``patch._start_listening``. The former may also wait for log handlers and the network; the latter waits until
   a new listener's threads run.
2. Four locks. No thread waits for one of them while it holds another of them.

   - ``threads._locks``: held by a thread that starts another, until that one runs. Only Odoo's threads do so, and the
     listener's when it becomes a leader.
   - ``Backlog._lock``: held by a supervisor while it chooses a database to query, but not during the query.
   - ``Follower._lock``: held by the listener's thread or the leader's, around calls that never block.
   - ``Waker._lock``: held by any thread, but only the one that reads the waker waits for it.

3. ``Listener.changed``, a condition with a re-entrant lock: held by any thread. It protects the public attributes and
   the set of feeds. The listener waits on this condition between two sessions, the supervisor for news, and threads of
   Odoo until LISTEN is in force. A thread that holds it calls no method of a feed, session or waker, except in a
   finalizer.

``changed`` comes last, since the garbage collector may run a finalizer, which removes a feed, in a thread that holds
any other lock. For the same reason `Waker.wake` and `Waker.close` never wait for their lock. Finalizing a
listening cursor also takes the lock of Odoo's pool, as finalizing any Odoo cursor does. So one thread may hold the
pool's lock when a finalizer takes ``changed``, and another may hold ``changed`` when a finalizer takes the pool's lock.
The two threads never wait for each other, since Python runs one garbage collection at a time.

`sharing.Sharing` has no lock: the listener's thread calls `connect` and `close`, and `better` only reads. A forked
child has locks of its own, see ``patch._processes``.

All else relies on the GIL, under which one operation on a deque, set, dictionary or attribute is atomic. This concerns
the queues of `cursor.Feed` and `log.Journal`; the sets and dictionaries of `catchup`, `patch`, `log` and `sharing`,
which other threads copy before they iterate; and the attributes of a session. The supervisor writes some of these;
`wake` then makes the loop look at them. A change that takes several operations is not atomic; see `catchup.Backlog`,
which several supervisors may change.
"""

import contextlib
import itertools
import logging
import random
import selectors
import threading
import time
import uuid
import weakref

import psycopg2
from psycopg2.extensions import Notify

from . import connection, log
from .cursor import FEED_SIZE
from .forks import close_in_children
from .payload import BUS_CHANNEL, HEARTBEAT_CHANNEL, quote, readable
from .waker import Waker

_logger = logging.getLogger(__name__)

# The first and the longest delay, in seconds, from one attempt to connect to the next: after a failed attempt, or after
# a loss when no immediate reconnect is left. The delay doubles each time.
FIRST_DELAY, LONGEST_DELAY = 0.1, 5.0
# How many lost sessions may be replaced without delay, and how many seconds it takes until one more may be; see
# `Backoff`.
IMMEDIATE_RECONNECTS, SECONDS_PER_RECONNECT = 7, 4.0
# A session that lasted this many seconds proves that the server worked.
STEADY = 2.0

# PostgreSQL's settings for a confirmed session: a listener is idle most of the time, and a backend whose client
# has vanished must end within 30 s. Keepalives in seconds, tcp_user_timeout in milliseconds.
_SERVER_SETTINGS = {
    "idle_session_timeout": "0",
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "25000",
}
_READ_SETTINGS = (
    "SELECT name, source FROM pg_catalog.pg_settings"
    " WHERE name OPERATOR(pg_catalog.=) ANY (%s::pg_catalog.text[])"
)


class Listener(object):
    """Keep one session on ``database`` for feeds, which may come and go.

    ``connect(listener)`` returns a `Session`, or raises ``psycopg2.Error`` or ``OSError``.
    ``stopping()`` returns whether Odoo is stopping. ``journal`` is a `log.Journal`, which is called with
    each `log.Event`. ``series`` is Odoo's series, as a number. ``at_end()`` is called when `run` ends.
    ``counters``: a dictionary, see `log.COUNTERS`.

    Feeds are held weakly. A feed has these attributes:

    - ``channels``: a set of names
    - ``put(notifications)``, which returns how many of them did not fit
    - ``tell(facts, numbers)``: ``facts`` are the `connection.Facts` about the session, and ``numbers`` maps those
      channels of the feed that are in force to the numbers of their LISTENs. While no session is trusted, they are
      None and ``{}``
    - ``local``: False if the feed is another process that follows this one, see `sharing`

    Other threads may read these attributes of the listener. ``changed`` is notified when one of them changes:

    - ``session``: the current session, None while there is none
    - ``in_force``: the session, and those of its channels that local feeds want, each with a number. A new number
      means a new LISTEN, and so a gap: the supervisor makes up for it on Odoo's own channels, and `cursor.Feed.tell`
      reports it on all others
    - ``deaf_since``: monotonic seconds, None while a LISTEN is confirmed
    - ``failed``: True after an attempt to connect failed, or a session ended
    - ``lives``: the number of sessions so far
    - ``dropped``: how many batches with notifications of the bus overflowed at least one feed
    """

    def __init__(self, database, connect, stopping, journal, series=0, at_end=lambda: None, counters=None):
        self.database = database
        self.series = series
        self.journal = journal
        self.counters = dict.fromkeys(log.COUNTERS, 0) if counters is None else counters
        self.session = None
        self.in_force = (None, {})
        self.deaf_since = time.monotonic()
        self.failed = False
        self.lives = 0
        self.dropped = 0
        self.changed = threading.Condition()
        #: wakes the supervisor after a change, even while it selects on its connections; the supervisor clears it
        self.supervisor_waker = Waker()
        self._connect = connect
        self._stopping = stopping
        self._at_end = at_end
        self._feeds = weakref.WeakSet()
        self._ended = False
        self._next_number = itertools.count(1)
        self._numbers = {}
        self._token = None
        self._token_heard = False
        self._look_wanted = False
        self._waker = Waker()

    def run(self):
        """Keep a session until the listener is closed. Raises nothing."""
        backoff = Backoff()
        while not self.has_ended() and not self._stopping():
            pause = LONGEST_DELAY
            began = time.monotonic()
            try:
                lasted = self._live()
                pause = backoff.after(lasted, time.monotonic() - began)
            except Exception as error:
                # A bug must not silence the bus for good.
                self._journal(log.log_bug, _logger, error)
            with self.changed:
                # Waiting for a condition needs no file descriptor: there may be none left.
                self.changed.wait_for(self.has_ended, pause)
        self.close()
        self._at_end()
        self._waker.close()
        self.supervisor_waker.close()

    def _live(self):
        """Connect, serve the session until it ends, and report why.

        Return the seconds that the session lasted, None if no session was confirmed.
        """
        session = None
        served = None
        kind, reason = log.FAILED, ""
        try:
            session = self._connect(self)
            # The name is new each time, since a pooler may have kept the LISTENs of an earlier session.
            session.check_channel = "bus_alt_connection_%s" % uuid.uuid4().hex
            began = time.monotonic()
            self._listen(session)
            served, kind = session, log.LOST
            self._serve(session)
        except Moved as error:
            kind, reason = log.MOVED, str(error)
        except (psycopg2.Error, OSError) as error:
            reason = str(error)
        finally:
            if session is not None and session.fault:
                kind, reason = session.fault
            self._forget_session()
            # If the listener ends or moves to another session, its followers are dropped instead; for them, this is no
            # outage.
            if kind != log.MOVED and not self.has_ended():
                self._tell_feeds()
            if session is not None:
                session.close()
        if not self.has_ended():
            self._report(kind, served, reason)
        # A session on which no token arrived counts as a failed attempt.
        return None if served is None or served.confirmed is None else time.monotonic() - began

    def _serve(self, session):
        """Pass on what ``session`` receives until it raises an error, has a ``fault``, or nobody listens."""
        announced = None
        woken = True
        with selectors.DefaultSelector() as selector:
            selector.register(self._waker, selectors.EVENT_READ)
            selector.register(session, selectors.EVENT_READ)
            while not self.has_ended() and session.fault is None:
                if woken:
                    self._listen(session)
                    announced = self._announce(session, announced)
                self._receive(session)
                ready = selector.select(session.seconds_until_silent())
                woken = any(key.fileobj is self._waker for key, _events in ready)
                if woken:
                    # Clear it before the next pass, so that a change after this wakes up the next select.
                    self._waker.clear()

    def _listen(self, session):
        """Make ``session`` LISTEN on its check channel and, once it is trusted, on those of all feeds.

        Tell each feed what is in force.
        """
        channels = {session.check_channel}
        if session.trusted:
            channels.add(HEARTBEAT_CHANNEL)
            channels.update(*(feed.channels for feed in self._all_feeds()))
        if session.channels != channels:
            session.listen(frozenset(channels), self._warn)
        known = self._numbers if session is self.session else {}
        self._numbers = {name: known.get(name) or next(self._next_number) for name in session.channels}
        wanted = self.wanted
        with self._change():
            if session is not self.session:
                self.lives += 1
            self.session = session
            self.failed = False
            self.in_force = session, {name: self._numbers[name] for name in session.channels & wanted}
        self._tell_feeds()

    def _announce(self, session, announced):
        """Report that ``session`` is confirmed, unless this has been reported for the same channels, ``announced``.

        Return the channels that were announced last, or None.
        """
        confirmed = session.confirmed
        if not confirmed or confirmed == announced:
            return announced
        if announced is None:
            session.settle()
        with self._change():
            self.deaf_since = None
        self._report(log.CONFIRMED, session, ", ".join(sorted(confirmed)))
        return confirmed

    def _receive(self, session):
        look_wanted = self._look_wanted
        notifications = session.receive()
        if notifications:
            session.heard_at = time.monotonic()
            wanted = self.in_force[1]
            self.counters["notifications_received"] += sum(each.channel in wanted for each in notifications)
            self.deliver(notifications)
            for feed in self._all_feeds():
                if not feed.local:
                    feed.put([each for each in notifications if each.channel in feed.channels])
        # Look for the token last: everything that was sent before it has been delivered by now.
        heard = any(each.payload == self._token for each in notifications)
        # It may take several calls of receive() to get all that has arrived. Once one returns nothing, nothing is left.
        if heard or (look_wanted and not notifications):
            with self._change():
                self._token_heard = self._token_heard or heard
                self._look_wanted = False

    def _forget_session(self):
        with self._change():
            self.session = None
            self.in_force = (None, {})
            self.failed = True
            if self.deaf_since is None:
                self.deaf_since = time.monotonic()

    def _tell_feeds(self):
        facts = None
        numbers = {}
        if self.session is not None and self.session.trusted:
            facts = self.session.facts
            numbers = self._numbers
        for feed in self._all_feeds():
            feed.tell(facts, {name: numbers[name] for name in feed.channels if name in numbers})

    def deliver(self, notifications):
        """Put those ``notifications`` that Odoo can read into the local feeds that listen on their channels.

        Any thread may call this. Return False if no feed listens on the channels, or a feed had no room.
        """
        feeds = [feed for feed in self._all_feeds() if feed.local]
        wanted = frozenset().union(*(feed.channels for feed in feeds))
        channels = {each.channel for each in notifications} & wanted
        texts = [self._readable(each) for each in notifications if each.channel in wanted]
        texts = [each for each in texts if each is not None]
        dropped = sum(feed.put([each for each in texts if each.channel in feed.channels]) for feed in feeds)
        if dropped:
            self._note_dropped(channels, dropped)
        return bool(channels) and not dropped

    def _note_dropped(self, channels, number):
        with self.changed:
            self.counters["notifications_dropped"] += number
        names = ", ".join(sorted(channels))
        if BUS_CHANNEL not in channels:
            # The notifications that wait are enough to start cron. Other listeners get an error, see `cursor.Feed.put`.
            if log.rarely("dropped"):
                text = "the listener on %s does not fetch its notifications: %d are waiting, further ones are dropped"
                self._warn(text, names, FEED_SIZE)
            return
        if log.rarely("dropped bus"):
            text = "Odoo's loop does not fetch its notifications: %d are waiting, further ones are dropped and"
            text += " looked up later"
            self._warn(text, FEED_SIZE)
        with self._change():
            self.dropped += 1

    def _readable(self, notification):
        """Return ``notification`` with a payload that Odoo's bus can read, or None."""
        if notification.channel != BUS_CHANNEL:
            return notification
        payload = readable(notification.payload, self.series)
        if payload is not None:
            return Notify(notification.pid, notification.channel, payload)
        if log.rarely("unreadable"):
            text = "dropped a notification that Odoo's bus can't read, sent by backend pid %s on channel %s: %s"
            shown = ascii(notification.payload[:80])
            self._warn(text, notification.pid, notification.channel, shown)
        return None

    # For feeds and cursors. Any thread may call these. ---------------------------

    def has_ended(self):
        """Return whether `close` was called or no local feed is left; from then on, no feed is accepted."""
        with self.changed:
            if not any(feed.local for feed in self._all_feeds()):
                self._ended = True
            return self._ended

    def close(self):
        """Make `run` end. Returns at once."""
        with self._change():
            self._ended = True
        self.wake()

    def add(self, feed):
        """Serve ``feed`` as well; return False if the listener has ended."""
        with self.changed:
            if self._ended:
                return False
            self._feeds.add(feed)
            # A feed may be garbage-collected without having been removed.
            weakref.finalize(feed, self.wake).atexit = False
        self.wake()
        return True

    def remove(self, feed):
        """Stop serving ``feed``. The listener ends once it has no local feed, see `has_ended`."""
        with self._change():
            self._feeds.discard(feed)
        self.wake()

    def listen(self, feed, channels):
        """Change the channels of ``feed``. Returns at once; LISTEN is in force later, see `wait_for_listen`.

        The queue of the feed may still have notifications on the previous channels.
        """
        with self._change():
            feed.channels = channels
        self.wake()

    def wait_for_listen(self, feed, timeout):
        """Wait until LISTEN is in force for ``feed`` or connecting has failed, at most ``timeout`` seconds.

        Return whether it is in force.
        """

        def is_in_force():
            return self.session is not None and feed.channels <= self.session.channels

        self.wait(lambda: is_in_force() or (self.session is None and self.failed), timeout)
        return is_in_force()

    def _all_feeds(self):
        with self.changed:
            while True:
                # A finalizer may run inside the iteration and remove a feed.
                with contextlib.suppress(RuntimeError):
                    return list(self._feeds)

    # For the supervisor. Any thread may call these. --------------------------------

    @property
    def wanted(self):
        """The channels of all local feeds."""
        return frozenset().union(*(feed.channels for feed in self._all_feeds() if feed.local))

    def wait(self, condition, timeout):
        """Wait at most ``timeout`` seconds until ``condition()`` is true or the listener has ended.

        Return what ``condition()`` returns then.
        """
        with self.changed:
            self.changed.wait_for(lambda: self.has_ended() or condition(), timeout)
            return condition()

    def expect(self, token):
        """Prepare `wait_for_token`. To be called before ``token`` is sent."""
        with self.changed:
            self._token = token
            self._token_heard = False

    def wait_for_token(self, session, timeout, wait=None):
        """Wait at most ``timeout`` seconds for the expected token; return whether ``session`` received it.

        If this process was stopped or busy, the token may have arrived and not been read. So `run` gets
        another second to read it. ``wait``: a function to call instead of the method `wait`.
        """
        wait = wait or self.wait

        def over():
            return self._token_heard or self.session is not session

        if not wait(over, timeout):
            self._look_wanted = True
            self.wake()
            wait(lambda: over() or not self._look_wanted, 1.0)
        return self._token_heard and self.session is session

    def confirm(self, session, channels, round_trip):
        """Record that a token arrived on ``session`` after ``round_trip`` seconds, while ``channels`` were in force."""
        session.round_trip = round_trip
        session.confirmed = channels
        self.wake()

    def replace(self, session, kind, reason):
        """Make `run` end ``session`` and report this ``kind`` and ``reason``. A later session is not affected."""
        session.fault = kind, reason
        self.wake()

    def wake(self):
        """Make `run` look at what has changed. Returns at once. A finalizer may call this as well."""
        self._waker.wake()

    def _report(self, kind, session, reason):
        with self._change():
            self.journal(log.Event(kind, session, reason, time.monotonic()))

    def _warn(self, text, *args):
        self._journal(_logger.warning, text, *args)

    def _journal(self, write, *args):
        with self._change():
            self.journal.add(write, *args)

    @contextlib.contextmanager
    def _change(self):
        """Notify all threads that `wait`, at the end of the block."""
        with self.changed:
            yield
            self.changed.notify_all()
        self.supervisor_waker.wake()


class Moved(psycopg2.OperationalError):
    """The session ended, but another one can be expected at once: this is no outage."""


class Session(object):
    """The source of a listener's notifications: a connection of this process, or another process that has one."""

    #: the `connection.Facts` on the server at the other end
    facts = None
    #: the pid of the leader that has the connection; None if this process has it
    leader_pid = None
    #: the rank of that leader, see `sharing`
    rank = None
    #: the channels on which LISTEN is in force, and those that the server refused
    channels = frozenset()
    #: the address of a direct session, see `connection.place`
    place = None
    #: a channel that no other session listens on; the supervisor sends its first token there
    check_channel = None
    #: the channels that were in force when a token came back; None until then
    confirmed = None
    #: seconds from sending that token to its arrival
    round_trip = None
    #: monotonic seconds of the last notification
    heard_at = 0.0
    #: kind and reason of the event to report if the session is to be given up, else None
    fault = None

    @property
    def trusted(self):
        """Whether to LISTEN on more than the check channel.

        Through a pooler, a LISTEN may end up with another client. So the session LISTENs on the check
        channel alone, until a token shows that the pooler keeps the server connection for us.
        """
        return not self.facts.pooled or self.confirmed is not None

    def seconds_until_silent(self):
        """Return the seconds after which to call `receive` even if nothing arrives; None if there is no limit."""
        return None

    def settle(self):
        """Prepare the session for a long life. Called once, when the session is confirmed."""

    def explaining(self, examining_sender, sent_at, leaked):
        """A task: find out why a token did not arrive; return kind and reason of the event to report.

        ``examining_sender()`` is a task that returns the `connection.Facts` on a new pooled
        connection; ``sent_at``: monotonic seconds when the token was sent; ``leaked``: whether the
        sender received the token itself. Any thread may run it.
        """
        raise NotImplementedError


class DirectSession(Session, connection.Connection):
    """A connection of this process straight to PostgreSQL."""

    def prepare(self):
        close_in_children(self)
        self.place = connection.place(self.parameters)
        self.facts = self.examine()
        if self.facts.standby:
            raise psycopg2.OperationalError("is a standby, and only a primary accepts LISTEN")

    def listen(self, channels, warn):
        """LISTEN on ``channels`` and no others. They are in force on return, except those that the server refuses.

        ``warn(text, *args)`` logs a warning, and must not block.
        """
        statements = ["LISTEN %s" % quote(name) for name in sorted(channels)]
        unwanted = self.channels - channels
        statements += ["UNLISTEN %s" % quote(name) for name in sorted(unwanted)]
        # Other threads must not rely on a channel whose LISTEN is about to end.
        self.channels &= channels
        try:
            # Send them together, so that pg_stat_activity shows all channels. PgDog notices only the first of several
            # statements, so a pooler gets them one by one.
            for statement in statements if self.facts.pooled else ["; ".join(statements)]:
                self._execute(statement, warn)
        except psycopg2.Error as error:
            if not _is_about_names(error):
                raise
            # A name that the server refuses must not silence the other channels.
            for name in sorted(channels):
                self._execute_if_possible("LISTEN", name, warn)
            for name in sorted(unwanted):
                self._execute_if_possible("UNLISTEN", name, lambda *_warned_before: None)
        self.channels = channels

    def _execute_if_possible(self, statement, name, warn):
        try:
            self.execute("%s %s" % (statement, quote(name)))
        except psycopg2.Error as error:
            if not _is_about_names(error):
                raise
            # Followers come and go, and each change of the channels causes another attempt.
            if log.rarely(("refused", name)):
                warn("PostgreSQL refuses to listen on channel %s, which stays silent: %s", ascii(name), error)

    def _execute(self, statement, warn):
        try:
            self.execute(statement)
        except psycopg2.Error as error:
            if error.sqlstate != "58P01":
                raise
            # The queue of notifications may begin with a transaction whose status was removed. Fixed in PostgreSQL
            # 14.21, 15.16, 16.12, 17.8 and 18.2.
            if log.rarely("58P01"):
                warn("a bug in PostgreSQL (%s) kept LISTEN from working; update the server", error)
            self.execute("SELECT pg_catalog.pg_notification_queue_usage()")
            self.execute(statement)

    def settle(self):
        """Keep the server from closing an idle session, and make it notice when this machine is gone.

        An administrator's settings for TCP are kept. Settings that the server lacks are left out.
        """
        if self.facts.pooled:
            return
        try:
            for name, source in self.execute(_READ_SETTINGS, (sorted(_SERVER_SETTINGS),)):
                if source == "default" or name == "idle_session_timeout":
                    self.execute("SELECT pg_catalog.set_config(%s, %s, false)", (name, _SERVER_SETTINGS[name]))
        except psycopg2.Error as error:
            # The role may lack the right, and the session works without these settings. If the server has ended the
            # session, the next statement fails as well.
            if not getattr(error, "sqlstate", None):
                raise
        # pg_stat_activity shows the last statement of a session, which should be LISTEN.
        self.listen(self.channels, lambda *_warned_before: None)

    def explaining(self, examining_sender, sent_at, leaked):
        # Examine both servers again, since one of them may have been restarted. If a server can't be reached, do not
        # try again: there is no time left in the check interval.
        try:
            facts = yield from self._examining_anew()
            sender = yield from examining_sender()
            if facts.started != sender.started:
                # The server may have been restarted or replaced between the two.
                facts = yield from self._examining_anew()
        except (psycopg2.Error, OSError) as error:
            text = "nothing arrives from %s, and a new connection fails: %s"
            return log.LOST, text % (self.facts.address, error)
        # The sender never issued LISTEN. If it received the token, the pooler gave it our server connection. If the
        # address leads to a different server, that alone explains the missing token, even behind a pooler that keeps
        # the connection for us.
        pooled = leaked or (facts.pooled and facts.started == sender.started)
        if not pooled:
            pooled = (yield from connection.keeping_session(self.parameters)) is False
        facts = facts._replace(pooled=pooled)
        was_replaced = facts.started != self.facts.started and not (facts.pooled or facts.standby)
        # If the session worked before, this is probably a failover, which pooled connections may not have followed yet.
        # So give advice only if the next session hears nothing either.
        if was_replaced and (self.confirmed is not None or facts.started == sender.started):
            return log.LOST, "%s was restarted or replaced, and nobody closed the connection" % facts.address
        return log.UNHEARD, connection.why_deaf(facts, sender)

    def _examining_anew(self):
        """A task: return the `connection.Facts` on a new connection to the same address."""
        quickly = dict(self.parameters, connect_timeout=connection.PROBE_TIMEOUT)
        return (yield from connection.examining_once(connection.opening(quickly)))


def _is_about_names(error):
    """Return whether PostgreSQL refused a statement because of a name in it.

    SQLSTATE class 22 means that the encoding lacks a character, the other codes that a name is invalid.
    """
    sqlstate = error.sqlstate or ""
    return sqlstate.startswith("22") or sqlstate in ("42601", "42602", "42622")


class Backoff(object):
    """How long to wait before the next attempt to connect.

    Lost sessions are replaced at once while a budget lasts. It allows `IMMEDIATE_RECONNECTS` replacements, and
    grows by one every `SECONDS_PER_RECONNECT` seconds up to that number. A session that lasted longer than
    `LONGEST_DELAY` uses up none of it. So the second and third loss in a row do not delay
    notifications either, but a path that breaks at each notification does not cause a storm of logins.
    """

    def __init__(self):
        #: the last delays, in seconds: after sessions that were lost, and after attempts that failed
        self._after_losses = 0.0
        self._after_failures = 0.0
        self._budget = float(IMMEDIATE_RECONNECTS)
        self._filled_at = time.monotonic()

    def after(self, lasted, took):
        """Return the seconds to wait.

        ``lasted``: the seconds that the session lasted, None if no session worked;
        ``took``: the seconds since the attempt to connect began.
        """
        now = time.monotonic()
        self._budget += (now - self._filled_at) / SECONDS_PER_RECONNECT
        self._budget = min(self._budget, float(IMMEDIATE_RECONNECTS))
        self._filled_at = now
        if lasted is None:
            self._after_failures = _longer(self._after_failures)
            return _pause(self._after_failures, took)
        if lasted >= STEADY:
            # The server worked, so start again with the shortest delay, even if it is restarted several times.
            self._after_failures = 0.0
        if lasted > LONGEST_DELAY:
            self._after_losses = 0.0
            return 0.0
        if self._budget >= 1:
            self._budget -= 1
            return 0.0
        self._after_losses = _longer(self._after_losses)
        return _pause(self._after_losses, took)


def _longer(delay):
    return min(max(FIRST_DELAY, 2 * delay), LONGEST_DELAY)


def _pause(delay, took):
    """Return how many seconds to wait after an attempt that took ``took`` seconds.

    ``delay`` is the time from the beginning of one attempt to that of the next. It is shortened at random, so that
    processes do not retry in step.
    """
    return max(delay * random.uniform(0.5, 1) - took, 0.0)
