"""A process that has no file descriptors left."""

import contextlib
import resource


@contextlib.contextmanager
def out_of_descriptors(pid):
    """Let a process open nothing more; what it has open stays so."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (4, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
