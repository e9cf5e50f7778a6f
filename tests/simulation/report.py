"""The table at the end: of each invariant the worst value that was seen, and the limit."""

from . import invariants
from .kernel import BEGIN

_GROUPS = ("one kind", "two kinds", "all kinds")


class Report:
    """Collects what the runs have found, by the number of kinds of faults at a time."""

    def __init__(self):
        self._worst = {group: invariants.Worst() for group in _GROUPS}
        self.seeds = self.bad = self.messages = 0
        self.hours = 0.0
        self.lines = {}

    def add(self, world):
        group = _GROUPS[min(len(world.kinds), 3) - 1] if world.kinds else _GROUPS[0]
        self._worst[group].merge(world.watch.worst)
        self.seeds += 1
        self.bad += bool(world.kernel.problems)
        self.messages += world.watch.messages
        self.hours += (world.kernel.now - BEGIN) / 3600
        for line, number in world.watch.line_kinds.items():
            self.lines[line] = self.lines.get(line, 0) + number

    def table(self):
        """Return the lines of the table."""
        lines = ["%-20s %-10s %10s %10s  %s" % ("invariant", "faults", "worst", "limit", "where")]
        for invariant in invariants.ALL:
            for group in _GROUPS:
                found = self._worst[group].get(invariant)
                if found:
                    value, limit, where = found
                    mark = " " if value <= limit else "!"
                    row = (invariant, group, "%.4g" % value, "%.4g" % limit, mark, where[:110])
                    lines.append("%-20s %-10s %10s %10s %s %s" % row)
        return lines
