"""Faults that are planted in the addon: are they found? See ``__main__.py``; the faults are in ``faults.ini``."""

import collections
import configparser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ADDON = "bus_alt_connection"
_LIST = Path(__file__).with_name("faults.ini")

#: ``old`` is replaced by ``new`` in a ``module``; a user would ``notice`` it, or it is ``harmless`` for a reason
Fault = collections.namedtuple("Fault", "name module old new notice harmless")


def listed():
    """Return all planted faults, in their order."""
    faults = configparser.ConfigParser(delimiters=("=",), comment_prefixes=("#",), interpolation=None)
    faults.read(_LIST, encoding="utf-8")
    return [Fault(name, *(faults[name].get(field) for field in Fault._fields[1:])) for name in faults.sections()]


def planted(fault, root):
    """Return the file below ``root`` that ``fault`` changes, and its text with the fault."""
    path = root / ADDON / (fault.module + ".py")
    text = path.read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        raise ValueError("%s: %r occurs %d times in %s" % (fault.name, fault.old, text.count(fault.old), path.name))
    return path, text.replace(fault.old, fault.new)
