"""Running programs that make something: quiet when they succeed, telling when they fail."""

import re
import subprocess
import sys

_LAST_LINES = 30


class CommandError(RuntimeError):
    """A program has failed; the message has its command line and the end of what it printed."""


def say(text):
    """Tell on stderr what takes long now."""
    print(text, file=sys.stderr, flush=True)


def run(command, **options):
    """Run a program and return what it wrote to stdout, as text.

    :param command: list of arguments
    :param options: passed to :func:`subprocess.run`
    :raise CommandError: it can not be started, takes longer than its ``timeout``, or has an exit code other than 0
    """
    command = [str(argument) for argument in command]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            **options,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CommandError("can not run %s: %s" % (_shown(command), error)) from error
    if done.returncode:
        printed = (done.stdout + done.stderr).splitlines()[-_LAST_LINES:]
        raise CommandError("exit code %s of: %s\n%s" % (done.returncode, _shown(command), "\n".join(printed)))
    return done.stdout


def reason(error):
    """Return in one line why something failed.

    Of what a program has printed it is what that calls its error, as apt and git do, or else the last line.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    named = [line.partition(": ")[2] for line in lines if re.match("(E|fatal|error): ", line)]
    return named[0].rstrip(":") if named else lines[-1 if isinstance(error, CommandError) else 0]


def _shown(command):
    # A whole script as an argument would hide what it printed.
    return " ".join("..." if "\n" in argument else argument for argument in command)
