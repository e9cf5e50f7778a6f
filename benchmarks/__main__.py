"""Measure this addon and its alternatives side by side: ``make bench``.

    python -m benchmarks [--quick] [PART ...]

Without a part all are measured. Each part is written to ``benchmarks/results.json`` as soon as it is there; a part that
fails is named there, with the error, and keeps none of the others from being measured. Exit code 1: one has failed.
"""

import argparse
import datetime
import signal
import sys
import time
import traceback

from stack import servers

from . import burst, connections, cost, flood, latency, listeners, outage, plots, report, scale, sharing, versions

PARTS = {
    "latency": latency,
    "sharing": sharing,
    "outage": outage,
    "connections": connections,
    "flood": flood,
    "listeners": listeners,
    "burst": burst,
    "cost": cost,
    "scale": scale,
}


def main():
    parser = argparse.ArgumentParser(prog="make bench", description="Measure the addon and its alternatives.")
    parser.add_argument("parts", nargs="*", metavar="PART", help="of: " + ", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="few samples, in 5 minutes: see that it works")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error("no such part: %s; there are: %s" % (", ".join(sorted(unknown)), ", ".join(PARTS)))
    try:
        servers.check()
    except RuntimeError as error:
        parser.error(str(error))
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        return bench(arguments.parts or list(PARTS), arguments.quick)
    except KeyboardInterrupt:
        print("\ninterrupted; all servers are stopped", file=sys.stderr)
        return 130


def bench(names, quick):
    began = time.monotonic()
    results = report.load(quick)
    results["versions"] = versions.collect()
    failed = []
    for name in names:
        results["parts"][name] = part = _begin(PARTS[name], quick)
        _tell(began, name)
        part_began = time.monotonic()
        try:
            for key, figures in PARTS[name].run(quick, lambda text, name=name: _tell(began, "%s: %s" % (name, text))):
                part["figures"][key] = figures
                part["seconds"] = round(time.monotonic() - part_began)
                report.save(results)
        except Exception as error:
            failed.append(name)
            part["failed"] = "%s: %s" % (type(error).__name__, str(error).split("\n")[0])
            traceback.print_exc()
        part["seconds"] = round(time.monotonic() - part_began)
        report.save(results)
        _tell(began, "%s: %s in %d s" % (name, "FAILED" if name in failed else "done", part["seconds"]))
    report.write_tables(results)
    plots.draw(results)
    print("\n" + report.text(results))
    if failed:
        print("FAILED: " + ", ".join(failed), file=sys.stderr)
    return 1 if failed else 0


def _begin(module, quick):
    return {
        "how": " ".join(module.HOW.split()),
        "at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "quick": quick,
        "figures": {},
    }


def _tell(began, text):
    minutes, seconds = divmod(int(time.monotonic() - began), 60)
    print("[%2d:%02d] %s" % (minutes, seconds, text), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
