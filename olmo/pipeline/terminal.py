"""Errors on snakemake's terminal, shortened to one sentence; snakemake's log keeps the rest.

A ValueError of the plan is a user's mistake, and its message names the fix. Snakemake prints it as
an InputFunctionException with wildcards and a traceback.
"""

import atexit
import logging
import re
import sys
from collections.abc import Iterable
from typing import TextIO

from olmo.pipeline.targets import describe_unknown_target
from olmo.runtime.log import describe_error

# Where snakemake tells an exception's type and message, and which types a user can fix: of a rule's
# function, of the Snakefile, of snakemake itself.
USERS = (ValueError, OSError)
EXCEPTIONS = (
    (re.compile(r"^InputFunctionException .*?\nError:\n  (\w+): (.*?)\nWildcards:", re.S), USERS),
    (re.compile(r"^(\w+) in file .*?, line \d+:\n(.*?)\n  File ", re.S), USERS),
    (re.compile(r"^Traceback .*\n(\w+): (.*?)\s*$", re.S), (OSError,)),
)
NO_RULE = re.compile(r"^MissingRuleException:\nNo rule to produce (.*?) \(if you use")
NO_FILE = re.compile(r"^MissingInputException .*\n +affected files:\n(.*)$", re.DOTALL)


SNAKEMAKES = re.compile(
    r"^(?:Error|WorkflowError)(?: in file .*?)?:\s+(.*?)(?:\n  File .*)?$", re.DOTALL
)
ABOUT_A_JOB = re.compile(
    r"CalledProcessError|^Exiting because a job execution failed"
    r"|At least one job did not complete successfully"
)


def list_names(kinds: Iterable[type]) -> set[str]:
    """The names of classes and of their subclasses."""
    found = list(kinds)
    for kind in found:
        found += kind.__subclasses__()
    return {kind.__name__ for kind in found}


def add_remedy(message: str) -> str:
    """An OSError's message as `describe_error` has it; any other as it is.

    >>> add_remedy("[Errno 20] Not a directory: 'data/a'")
    'data/a: Not a directory; name another place'
    """
    found = re.fullmatch(r"\[Errno (\d+)\] (.*): '(.*)'", message)
    return describe_error(OSError(int(found[1]), found[2], found[3])) if found else message


def is_about_a_job(text: str) -> bool:
    """Whether snakemake's error says no more than that a job failed."""
    return ABOUT_A_JOB.search(text) is not None


def shorten_error(text: str) -> str:
    """The message of a user's error; the full text of any other, which is a bug.

    >>> shorten_error('ValueError in file "/Snakefile", line 3:\\nexpected a, found b\\n  File "y"')
    'expected a, found b'
    """
    for pattern, kinds in EXCEPTIONS:
        if (found := pattern.search(text)) and found[1] in list_names(kinds):
            return add_remedy(found[2])
    if found := NO_RULE.search(text):
        return describe_unknown_target(found[1])
    if found := NO_FILE.search(text):
        files = " and ".join(found[1].split())
        return (
            f"expected {files}, which does not exist and no rule makes; write it, or name another"
        )
    return found[1] if (found := SNAKEMAKES.search(text)) else text


class ShortErrorFormatter(logging.Formatter):
    """Formats errors by `shorten_error`, and everything else by the formatter it replaces."""

    def __init__(self, original: logging.Formatter) -> None:
        super().__init__()
        self.original = original

    def format(self, record: logging.LogRecord) -> str:
        text = self.original.format(record)
        return shorten_error(text) if getattr(record, "exception", None) else text


def shorten_errors() -> None:
    """Shorten the errors that snakemake prints to the terminal."""
    for handler in logging.getLogger("snakemake.logging").handlers:
        if handler.name == "DefaultStreamHandler" and handler.formatter is not None:
            handler.setFormatter(ShortErrorFormatter(handler.formatter))


def print_at_exit(text: str, stream: TextIO = sys.stderr) -> None:
    """Print when this process exits, after everything else that it prints."""

    def flush_and_print() -> None:
        sys.stdout.flush()
        print(text, file=stream, flush=True)

    atexit.register(flush_and_print)
