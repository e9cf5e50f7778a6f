"""Which kinds of faults a seed is about: one kind, two, or all."""

import itertools

from .faults import KINDS

# Coprime to the number of pairs more often than not, so that neighbours differ.
_STRIDE = 101
_NAMES = sorted(KINDS)
_SETTINGS = [name for name in _NAMES if KINDS[name].is_setting]
_FAULTS = [name for name in _NAMES if not KINDS[name].is_setting]
# Two settings cannot hold at once, since both say where the direct way leads to.
_PAIRS = [pair for pair in itertools.combinations(_NAMES, 2) if not set(pair) <= set(_SETTINGS)]


def kinds_of(seed):
    """Return the names of the kinds: of three seeds one has a kind alone, one a pair, one all kinds and settings."""
    number, sort = divmod(seed, 3)
    if sort == 0:
        return [_NAMES[number % len(_NAMES)]]
    if sort == 1:
        return list(_PAIRS[number * _STRIDE % len(_PAIRS)])
    # Every other one is without a setting.
    return _FAULTS + ([_SETTINGS[number // 2 % len(_SETTINGS)]] if number % 2 else [])
