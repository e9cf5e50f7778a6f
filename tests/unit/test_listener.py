"""A listener that has lost its connection."""

from bus_alt_connection.listener import _delay


def test_the_delay_doubles_up_to_5_s_and_differs_each_time():
    for attempts, longest in ((1, 0.1), (2, 0.2), (3, 0.4), (6, 3.2), (7, 5), (100000, 5)):
        delays = {_delay(attempts) for _ in range(200)}
        assert longest / 2 <= min(delays) < longest * 0.6
        assert longest * 0.9 < max(delays) <= longest
