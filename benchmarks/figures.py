"""From samples to the figures of ``results.json``."""

import statistics


def spread(samples, digits=3):
    """Return median, least and greatest of ``samples``, and how many there are; None for none."""
    if not samples:
        return None
    return {
        "median": round(statistics.median(samples), digits),
        "min": round(min(samples), digits),
        "max": round(max(samples), digits),
        "runs": len(samples),
    }


def percentile(samples, percent):
    """Return the smallest sample that at least so many percent do not exceed."""
    ordered = sorted(samples)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def milliseconds(samples):
    """Return p50, p95 and p99 of ``samples``, which are in seconds, in ms; None for none."""
    if not samples:
        return None
    return {"p%d" % percent: round(percentile(samples, percent) * 1000, 3) for percent in (50, 95, 99)}


def curve(samples):
    """Return the percentiles 0 to 100 of ``samples`` in ms, for a plot."""
    return [round(percentile(samples, percent) * 1000, 3) for percent in range(101)]


def ratios(samples, base, blocks=10):
    """Return the ratio of the medians, and its spread over so many blocks of samples taken side by side."""
    if not samples or not base:
        return None
    size = max(1, min(len(samples), len(base)) // blocks)
    each = [
        statistics.median(samples[start : start + size]) / statistics.median(base[start : start + size])
        for start in range(0, min(len(samples), len(base)) - size + 1, size)
    ]
    whole = statistics.median(samples) / statistics.median(base)
    return {"ratio": round(whole, 3), **{"block_" + key: value for key, value in spread(each).items()}}


def pushes(pairs, base):
    """Return the figures of pairs of seconds, from after and from before a NOTIFY, with ratios to those of ``base``."""
    after, before = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return {
        "runs": len(pairs),
        "after": milliseconds(after),
        "before": milliseconds(before),
        "ratio_after": ratios(after, [pair[0] for pair in base]),
        "ratio_before": ratios(before, [pair[1] for pair in base]),
        "curve": curve(after),
    }
