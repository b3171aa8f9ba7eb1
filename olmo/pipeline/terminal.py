"""What snakemake's terminal shows of an error: a sentence, last. Its log keeps the rest.

A ValueError of the plan is a user's mistake with its remedy in it. Snakemake calls it an
InputFunctionException, and puts wildcards and a traceback behind it.
"""

import atexit
import logging
import re
import sys

USERS = r"(?:ValueError|FileNotFoundError|PermissionError)"  # what a user can mend
SENTENCES = (
    re.compile(rf"^InputFunctionException .*?\nError:\n  {USERS}: (.*?)\nWildcards:", re.DOTALL),
    re.compile(rf"^{USERS} in file .*?, line \d+:\n(.*?)\n  File ", re.DOTALL),
)
NO_RULE = re.compile(r"^MissingRuleException:\nNo rule to produce (.*?) \(if you use")

NO_FILE = re.compile(r"^MissingInputException .*\n +affected files:\n(.*)$", re.DOTALL)


def sentence(text: str) -> str:
    """What there is to say of an error; all of it where it is nobody's mistake but ours.

    >>> sentence('ValueError in file "/x/Snakefile", line 3:\\nexpected a, found b\\n  File "y"')
    'expected a, found b'
    """
    for pattern in SENTENCES:
        if found := pattern.search(text):
            return found[1]
    if found := NO_RULE.search(text):
        return (
            f"no rule makes {found[1]}; targets are checkpoints/<run>/final, hf/<run>, eval/<run> "
            "and data/<dataset>/statistics.txt, with the runs of config/config.yaml"
        )
    if found := NO_FILE.search(text):
        files = " and ".join(found[1].split())
        return (
            f"expected {files}, which does not exist and no rule makes; write it, or name another"
        )
    return text


class Brief(logging.Formatter):
    """Errors as `sentence` has them, the rest as before."""

    def __init__(self, whole: logging.Formatter) -> None:
        super().__init__()
        self.whole = whole

    def format(self, record: logging.LogRecord) -> str:
        text = self.whole.format(record)
        return sentence(text) if getattr(record, "exception", None) else text


def brief() -> None:
    """Let snakemake's terminal be brief of users' mistakes."""
    for handler in logging.getLogger("snakemake.logging").handlers:
        if handler.name == "DefaultStreamHandler" and handler.formatter is not None:
            handler.setFormatter(Brief(handler.formatter))


def at_the_end(text: str) -> None:
    """Say something when all others have spoken."""

    def last() -> None:
        sys.stdout.flush()
        print(text, file=sys.stderr, flush=True)

    atexit.register(last)
