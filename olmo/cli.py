"""`olmo <command>`: the command line of every stage and tool.

olmo/commands.py has the commands and their flags; here is what surrounds a call: signals, the log
file, exit statuses, errors as one sentence.
"""

import ast
import difflib
import os
import select
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from olmo.commands import bind, command_groups, commands, load_command
from olmo.runtime.log import FAILED, LOG_ENV, describe_error, find_disk_errno, is_shown_from_log
from olmo.runtime.process import EXIT_PAUSED, Paused, die_with_supervisor
from olmo.runtime.urls import redact, stash_secrets
from olmo.store.stage import require_store
from olmo.usage import fill, parse_docstring

EXAMPLES = (
    "olmo new novels ~/texts         # configs for a folder of text",
    "olmo runs                       # every run, and how far it came",
    "olmo chat olmo-tiny-tulu        # talk with a checkpoint",
    "olmo generate --help            # options and examples of a command",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. A user's error is one sentence and exit status 1.

    Training that was stopped after saving exits with 75: the same command resumes it.
    """
    arguments = sys.argv[1:] if argv is None else argv
    # A word with spaces is text, in which nothing is taken for a URL.
    words = [word if " " in word else stash_secrets(word) for word in arguments]
    verb = words.pop(0) if words else ""
    if words and f"{verb} {words[0]}" in commands():  # olmo store verify
        verb = f"{verb} {words.pop(0)}"
    try:
        try:
            run_command(verb, words)
        finally:
            sys.stdout.flush()  # raises BrokenPipeError if the reader (`| head`) has exited
    except Paused as pause:
        stop(f"olmo {verb}: {pause}", EXIT_PAUSED)
    except KeyboardInterrupt:
        stop(f"olmo {verb}: interrupted", 128 + signal.SIGINT)
    except BrokenPipeError:
        if not is_reader_gone():
            raise
        # As in Python's documentation: the flush at exit must not raise again.
        devnull = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(devnull, stream.fileno())
        sys.exit(1)
    except Exception as error:
        if LOG_ENV not in os.environ and not is_users(error):
            raise
        stop(redact(f"olmo {verb}: {describe_failure(error)}"))


def is_users(error: Exception) -> bool:
    """Whether an error is the user's or the machine's, and not a bug."""
    return isinstance(error, (ValueError, OSError)) or bool(find_disk_errno(error))


def describe_failure(error: Exception) -> str:
    """An error that ends a command with a log, as one sentence."""
    if is_users(error):
        return describe_error(error)
    place = os.environ[LOG_ENV]
    return f"a bug in olmo, {type(error).__name__}: {error}; the traceback is in {place}"


def stop(said: str, status: int = 1) -> NoReturn:
    """Exit with a last sentence, unless snakemake prints it at its end, from the log."""
    if is_shown_from_log():
        sys.exit(status)
    if status == 1:
        sys.exit(said)
    print(said, file=sys.stderr)
    sys.exit(status)


def run_command(verb: str, words: Sequence[str]) -> None:
    """Import a command's module, parse its arguments and call it."""
    if verb not in commands() and {"-h", "--help"} & {verb, *words[:1]}:
        print(format_usage([name for name in commands() if name.startswith(f"{verb} ")]))
        return
    if verb == "--version":
        print(f"olmo {version('olmo')}")
        return
    if verb not in commands():
        sys.exit(unknown_command_message(verb, words))
    # An exception, so that `finally` blocks run.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # Sent by a scheduler before a time limit: training handles it, other commands continue.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    command = load_command(verb)
    die_with_supervisor()
    log, call = bind(verb, command, words)
    if verb.startswith("store ") and verb != "store pull":  # `pull` may create the store
        require_store()
    with log_to(log):
        call()


def is_reader_gone() -> bool:
    """Whether the reader of stdout or stderr has exited; else another pipe is broken."""
    streams = select.poll()
    for stream in (sys.stdout, sys.stderr):
        streams.register(stream.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in streams.poll(0))


def format_usage(verbs: Sequence[str] = ()) -> str:
    """The commands, all or `verbs`, with their summaries. No module is imported."""
    lines = ["usage: olmo <command> [--help]"]
    for heading, group in command_groups().items():
        shown = {verb: place for verb, place in group.items() if not verbs or verb in verbs}
        lines += ["", f"{heading}:"] if shown and not verbs else []
        lines += [
            fill(f"  {verb:20}{command_summary(place)}", " " * 22) for verb, place in shown.items()
        ]
    if not verbs:
        lines += ["", "examples:", *(f"  {example}" for example in EXAMPLES)]
    return "\n".join(lines)


def command_summary(place: str) -> str:
    """The summary of a command's docstring, parsed since the import may need torch."""
    module, name = place.split(":")
    source = Path(__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return parse_docstring(ast.get_docstring(node) or "").summary
    return ""


def unknown_command_message(verb: str, words: Sequence[str]) -> str:
    """The error message for an unknown command; the usage for none."""
    subcommands = [name for name in commands() if name.startswith(f"{verb} ")]
    if not verb or (subcommands and not words):
        return format_usage(subcommands)
    name = f"{verb} {words[0]}" if subcommands else verb
    near = difflib.get_close_matches(name, subcommands or commands(), 3)
    hint = f"; the nearest: {', '.join(near)}" if near else ""
    return f"unknown command '{name}'{hint}; olmo --help lists all"


@contextmanager
def log_to(log: Path | None) -> Iterator[None]:
    """Copy the messages of this process and its children to a file, and the error that ends it.

    A `tee` would replace the terminal by a pipe, and so hide the progress bar: olmo.runtime.log
    writes its lines to the file that $OLMO_LOG names.
    """
    if log is None:
        yield
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    os.environ[LOG_ENV] = str(log.resolve())
    if is_shown_from_log():
        redirect_output(log)
    try:
        yield
    except BaseException as error:
        with suppress(OSError), log.open("a") as file:  # the disk may be what failed
            if isinstance(error, Exception) and not isinstance(error, Paused):
                file.writelines(map(redact, traceback.format_exception(error)))
            said = f"{type(error).__name__}: {error}"  # a signal
            if isinstance(error, Exception):
                said = describe_failure(error)
            file.write(redact(f"{FAILED}{said}\n"))
        raise


def redirect_output(log: Path) -> None:
    """Append to `log` what this process and its children write to stdout and stderr."""
    with log.open("a") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())


if __name__ == "__main__":
    main()
