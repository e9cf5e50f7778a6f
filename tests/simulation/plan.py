"""Which kinds of faults a seed is about: one kind, two, or all."""

import itertools

from .faults import KINDS

# Coprime to the number of pairs more often than not, so that neighbours differ.
_STRIDE = 101


def kinds_of(seed):
    """Return the names of the kinds: of three seeds one has a kind alone, one a pair, one all kinds and settings."""
    names = sorted(KINDS)
    number, sort = divmod(seed, 3)
    if sort == 0:
        return [names[number % len(names)]]
    if sort == 1:
        pairs = [pair for pair in itertools.combinations(names, 2) if _possible(pair)]
        return list(pairs[number * _STRIDE % len(pairs)])
    settings = [name for name in names if KINDS[name].is_setting]
    faults = [name for name in names if not KINDS[name].is_setting]
    # Every other one is without a setting.
    return faults + ([settings[number // 2 % len(settings)]] if number % 2 else [])


def _possible(pair):
    """Two settings cannot hold at once, since both say where the direct way leads to."""
    return not all(KINDS[name].is_setting for name in pair)
