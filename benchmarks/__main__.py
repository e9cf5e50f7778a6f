"""Measure this addon and its alternatives side by side: ``make bench``.

    python -m benchmarks [--quick] [PART ...]

Without a part all are measured. Each part is written to ``benchmarks/results.json`` as soon as it is there, and the
tables at the end. A part that fails ends the run.
"""

import argparse
import datetime
import sys
import time

from . import report, versions


def main():
    parser = argparse.ArgumentParser(prog="make bench", description="Measure the addon and its alternatives.")
    parser.add_argument("parts", nargs="*", metavar="PART", help="of: " + ", ".join(report.PARTS))
    parser.add_argument("--quick", action="store_true", help="few samples, in 5 minutes: see that it works")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(report.PARTS)
    if unknown:
        parser.error("no such part: %s; there are: %s" % (", ".join(sorted(unknown)), ", ".join(report.PARTS)))
    bench(arguments.parts or report.PARTS, arguments.quick)


def bench(names, quick):
    results = report.load(quick)
    results["versions"] = versions.collect()
    for name in names:
        at = _now()
        began = time.monotonic()
        tables = {}
        for title, row in report.PARTS[name](quick, lambda text, name=name: _tell("%s: %s" % (name, text))):
            tables.setdefault(title, []).append(row)
        seconds = round(time.monotonic() - began)
        results["parts"][name] = {"at": at, "seconds": seconds, "tables": tables}
        report.save(results)
        _tell("%s: done in %d s" % (name, seconds))
    print("\n" + report.write_tables(results))


def _now():
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _tell(text):
    print("[%s] %s" % (_now()[11:19], text), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
