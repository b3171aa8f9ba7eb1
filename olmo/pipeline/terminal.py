"""Errors on snakemake's terminal, shortened to one sentence; snakemake's log keeps the rest.

A ValueError of the plan is a user's mistake, and its message names the fix. Snakemake prints it as
an InputFunctionException with wildcards and a traceback.
"""

import atexit
import logging
import re
import sys
from typing import TextIO

from olmo.pipeline.targets import describe_unknown_target

# Errors that a user can fix.
USER_TYPES = r"(?:ValueError|OSError|FileNotFoundError|PermissionError)"
USER_ERRORS = (
    re.compile(
        rf"^InputFunctionException .*?\nError:\n  {USER_TYPES}: (.*?)\nWildcards:", re.DOTALL
    ),
    re.compile(rf"^{USER_TYPES} in file .*?, line \d+:\n(.*?)\n  File ", re.DOTALL),
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


def is_about_a_job(text: str) -> bool:
    """Whether snakemake's error says no more than that a job failed."""
    return ABOUT_A_JOB.search(text) is not None


def shorten_error(text: str) -> str:
    """The message of a user's error; the full text of any other, which is a bug.

    >>> shorten_error('ValueError in file "/Snakefile", line 3:\\nexpected a, found b\\n  File "y"')
    'expected a, found b'
    """
    for pattern in USER_ERRORS:
        if found := pattern.search(text):
            return found[1]
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
