"""Measure this addon and its alternatives side by side: ``make bench``.

    python -m benchmarks [--quick] [PART ...]

Without a part all are measured. Each part is written to ``benchmarks/results.json`` as soon as it is there. A part that
fails is named there, with the error, and keeps none of the others from being measured. Exit code 1: one has failed.
"""

import argparse
import datetime
import signal
import sys
import time
import traceback

from stack import servers

from . import plots, report, versions


def main():
    parser = argparse.ArgumentParser(prog="make bench", description="Measure the addon and its alternatives.")
    parser.add_argument("parts", nargs="*", metavar="PART", help="of: " + ", ".join(report.PARTS))
    parser.add_argument("--quick", action="store_true", help="few samples, in 5 minutes: see that it works")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(report.PARTS)
    if unknown:
        parser.error("no such part: %s; there are: %s" % (", ".join(sorted(unknown)), ", ".join(report.PARTS)))
    try:
        servers.check()
    except RuntimeError as error:
        parser.error(str(error))
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        return bench(arguments.parts or list(report.PARTS), arguments.quick)
    except KeyboardInterrupt:
        print("\ninterrupted; all servers are stopped", file=sys.stderr)
        return 130


def bench(names, quick):
    results = report.load(quick)
    results["versions"] = versions.collect()
    failed = []
    for name in names:
        results["parts"][name] = part = {"at": _now(), "tables": {}}
        began = time.monotonic()
        try:
            for title, row in report.PARTS[name](quick, lambda text, name=name: _tell("%s: %s" % (name, text))):
                part["tables"].setdefault(title, []).append(row)
        except Exception as error:
            failed.append(name)
            part["failed"] = "%s: %s" % (type(error).__name__, str(error).split("\n")[0])
            traceback.print_exc()
        part["seconds"] = round(time.monotonic() - began)
        report.save(results)
        _tell("%s: %s in %d s" % (name, "FAILED" if name in failed else "done", part["seconds"]))
    print("\n" + report.write_tables(results))
    plots.draw(results)
    if failed:
        print("FAILED: " + ", ".join(failed), file=sys.stderr)
    return 1 if failed else 0


def _now():
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _tell(text):
    print("[%s] %s" % (_now()[11:19], text), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
