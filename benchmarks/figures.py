"""From samples to figures. A figure with a spread is a list: the median, the least and the greatest."""

import statistics


def spread(samples, digits=3):
    """Return median, least and greatest of ``samples``; None if there are none."""
    if not samples:
        return None
    return [round(figure, digits) for figure in (statistics.median(samples), min(samples), max(samples))]


def milliseconds(samples, percents):
    """Return these percentiles of ``samples``, which are in seconds, in ms."""
    cuts = statistics.quantiles(samples, n=100, method="inclusive")
    return [round(cuts[percent - 1] * 1000, 3) for percent in percents]


def ratio(samples, base, blocks=10):
    """Return the ratio of the medians, and the least and greatest ratio among blocks of samples taken side by side."""
    size = max(1, min(len(samples), len(base)) // blocks)
    each = [
        statistics.median(samples[start : start + size]) / statistics.median(base[start : start + size])
        for start in range(0, min(len(samples), len(base)) - size + 1, size)
    ]
    whole = statistics.median(samples) / statistics.median(base)
    return [round(figure, 3) for figure in (whole, min(each), max(each))]
