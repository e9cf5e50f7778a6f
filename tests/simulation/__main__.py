"""``python -m tests.simulation``: see README.rst in this folder."""

import argparse
import gc
import math
import os
import pathlib
import sys
import time

from greenlet import GreenletExit
from tabulate import tabulate

if os.environ.get("PYTHONHASHSEED") != "0":
    # Sets of texts have an order of their own in each process otherwise.
    environ = dict(os.environ, PYTHONHASHSEED="0")
    os.execve(sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]], environ)

from . import faults, invariants, plan, stories, world  # noqa: E402
from .loading import PACKAGE, Addon  # noqa: E402

_ROOT = pathlib.Path(__file__).resolve().parents[2]
# A line says how far it is whenever so many seeds were run.
_PROGRESS = 10


def main():
    options = _arguments()
    addon = Addon(options.addon / PACKAGE)
    world.set_up_logging()
    sys.unraisablehook = _unraisable
    gc.disable()
    if options.stories is not None:
        return bool(stories.tell(addon, options.stories))
    if options.seed is not None:
        return _trace(addon, options)
    failed = stories.tell(addon, []) if options.kinds is None else 0
    if failed and options.stop:
        return True
    return bool(_run_seeds(addon, options) or failed)


def _unraisable(unraisable):
    """Report an exception in a finalizer, unless that belongs to a process that was killed."""
    if not issubclass(unraisable.exc_type, GreenletExit):
        sys.__unraisablehook__(unraisable)


def _arguments():
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="run this one and print its trace")
    parser.add_argument("--seeds", default="1-18", help="which to run: 7, 1-300, or 1- (default: 1-18, a minute)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many minutes")
    parser.add_argument("--kinds", help="kinds of faults instead of those of the seed: a,b or none")
    parser.add_argument("--stop", action="store_true", help="stop at the first seed that fails")
    parser.add_argument("--stories", nargs="*", help="tell these stories, or all, instead of running seeds")
    parser.add_argument("--addon", type=pathlib.Path, default=_ROOT, help="the folder that has the addon's folder")
    options = parser.parse_args()
    for known, given in (
        (faults.KINDS, [] if options.kinds in (None, "none") else options.kinds.split(",")),
        ({story.__name__ for story in stories.STORIES}, options.stories or []),
    ):
        unknown = sorted(set(given) - set(known))
        if unknown:
            parser.error("there is no %s; there are: %s" % (", ".join(unknown), ", ".join(sorted(known))))
    return options


def _kinds(options, seed):
    if options.kinds is None:
        return plan.kinds_of(seed)
    return [] if options.kinds == "none" else options.kinds.split(",")


def _trace(addon, options):
    run = world.World(addon, options.seed, _kinds(options, options.seed), keep_trace=True)
    problems = run.run()
    world.forget()
    for line in run.kernel.trace:
        print(line)
    print("digest %x, %d steps" % (run.kernel.digest & 0xFFFFFFFF, run.kernel.steps))
    print("processes %s, machines %d, environment %s" % (run.processes, run.machines, run.environ))
    for when, invariant, text in problems:
        print("%10.4f  %s: %s" % (when - world.BEGIN, invariant, text))
    return bool(problems)


def _run_seeds(addon, options):
    """Run the seeds, print the problems of each that fails and the worst of each invariant; return how many fail."""
    first, _, last = options.seeds.partition("-")
    last = int(last) if last else (1 << 31 if "-" in options.seeds else int(first))
    began, seconds, messages, failed = time.monotonic(), 0.0, 0, 0
    worst = {}
    for number, seed in enumerate(range(int(first), last + 1), 1):
        run = world.World(addon, seed, _kinds(options, seed))
        problems = run.run()
        seconds += run.now - world.BEGIN
        messages += run.watch.messages
        failed += bool(problems)
        for invariant, found in run.watch.worst.items():
            worst[invariant] = max(found, worst.get(invariant, found))
        # Of each invariant the first, since one fault may hide another.
        for invariant, (when, text) in {invariant: (when, text) for when, invariant, text in problems[::-1]}.items():
            what = (seed, run.title, when - world.BEGIN, invariant, text[:300])
            print("seed %d (%s) at %.3f: %s: %s" % what, flush=True)
        took = time.monotonic() - began
        is_last = seed == last or took > options.minutes * 60 or bool(options.stop and failed)
        if is_last or seed % _PROGRESS == 0:
            text = "%d seeds, %d failed; %.1f simulated hours in %.0f s, %d messages"
            print(text % (number, failed, seconds / 3600, took, messages), flush=True)
        world.forget()
        del run, problems
        if is_last:
            break
    rows = [(name, *worst[name][1:]) for name in invariants.ALL if name in worst]
    print(tabulate(rows, ("invariant", "worst", "limit"), tablefmt="simple", floatfmt=".4g"))
    return failed


sys.exit(main())
