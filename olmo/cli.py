"""`olmo <command>`: the command line of every stage and tool.

The flags are the parameters of the command's function: `keep_one_in: int = 1` is `--keep-one-in 1`.
A command's module is imported only when it runs, so that `olmo order` does not import torch.
"""

import argparse
import ast
import dataclasses
import difflib
import functools
import importlib
import inspect
import json
import os
import select
import signal
import sys
import textwrap
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from olmo.runtime.log import FAILED, LOG_ENV, describe_error, find_disk_errno
from olmo.runtime.process import EXIT_PAUSED, Paused, die_with_supervisor
from olmo.runtime.urls import redact, stash_secrets
from olmo.store.stage import Stage, parameter_role, require_store

# A module of olmo/corpus with a function `batch` is the command of its name. All others:
OTHER_COMMANDS = {
    "source-list": "olmo.corpus.sources:source_list",
    "sources": "olmo.corpus.ingest:sources",
    "given-tokens": "olmo.corpus.ingest:given_tokens",
    "order": "olmo.corpus.order:order",
    "positions": "olmo.corpus.order:positions",
    "environment": "olmo.corpus.environments:environment",
    "new": "olmo.pipeline.new:new",
    "start": "olmo.pipeline.start:start",
    "train": "olmo.pipeline.train:train_run",
    "soup": "olmo.pipeline.soup:soup",
    "hf": "olmo.pipeline.export:hf",
    "heldout": "olmo.pipeline.evaluate:heldout",
    "docstrings": "olmo.pipeline.evaluate:docstrings",
    "evaluate": "olmo.pipeline.evaluate:evaluate",
    "checkpoint convert": "olmo.pipeline.convert:convert",
    "inspect": "olmo.inspect.commands:inspect",
    "seen": "olmo.inspect.commands:seen",
    "replay": "olmo.inspect.replay:replay",
    "generate": "olmo.inspect.generate:generate_text",
    "bench": "olmo.report.bench:bench",
    "runs": "olmo.report.runs:runs",
    "compare": "olmo.report.compare:compare",
    "scores": "olmo.report.scores:scores",
    "store verify": "olmo.store.commands:verify",
    "store gc": "olmo.store.commands:gc",
    "store checkout": "olmo.store.commands:checkout",
    "store why": "olmo.store.commands:why",
    "store trace": "olmo.store.commands:trace",
    "store pin": "olmo.store.commands:pin",
    "store push": "olmo.store.commands:push",
    "store pull": "olmo.inspect.pull:pull",
}
# Headings of the usage: package → what its commands do.
GROUPS = {
    "corpus": "from sources to tokens",
    "pipeline": "from tokens to a checkpoint, and its evaluation",
    "inspect": "inspection of a run",
    "report": "comparison of runs and settings",
    "store": "the store",
}


@functools.cache
def commands() -> dict[str, str]:
    """Command → "module:function". No module is imported."""
    found = {}
    for path in sorted(Path(__file__).parent.joinpath("corpus").glob("*.py")):
        if "\ndef batch(" in path.read_text(encoding="utf-8"):
            found[path.stem.replace("_", "-")] = f"olmo.corpus.{path.stem}:batch"
    return found | OTHER_COMMANDS


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
        print(f"olmo {verb}: {pause}", file=sys.stderr)
        sys.exit(EXIT_PAUSED)
    except KeyboardInterrupt:
        print(f"olmo {verb}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        if not is_reader_gone():
            raise
        # As in Python's documentation: the flush at exit must not raise again.
        devnull = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(devnull, stream.fileno())
        sys.exit(1)
    except Exception as error:
        if isinstance(error, (ValueError, OSError)) or find_disk_errno(error):
            sys.exit(redact(f"olmo {verb}: {describe_error(error)}"))
        if LOG_ENV not in os.environ:
            raise
        sys.exit(
            redact(
                f"olmo {verb}: a bug in olmo, {type(error).__name__}: {error}; the "
                f"traceback is in {os.environ[LOG_ENV]}"
            )
        )


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
    module, name = commands()[verb].split(":")
    command = getattr(importlib.import_module(module), name)
    die_with_supervisor()
    arguments = parse_arguments(verb, command, words)
    if verb.startswith("store ") and verb != "store pull":  # `pull` may create the store
        require_store()
    with log_to(arguments.pop("log")):
        positional = [arguments.pop(name) for name in positional_parameters(command)]
        command(*positional, **arguments)


def is_reader_gone() -> bool:
    """Whether the reader of stdout or stderr has exited; else another pipe is broken."""
    streams = select.poll()
    for stream in (sys.stdout, sys.stderr):
        streams.register(stream.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in streams.poll(0))


def format_usage(verbs: Sequence[str] = ()) -> str:
    """The commands, all or `verbs`, with their summaries. No module is imported."""
    lines = ["usage: olmo <command> [--help]"]
    for package, heading in GROUPS.items():
        in_package = {
            verb: place
            for verb, place in sorted(commands().items())
            if (verb.split()[0] if verb.startswith("store ") else place.split(".")[1]) == package
            and (not verbs or verb in verbs)
        }
        lines += ["", f"{heading}:"] if in_package and not verbs else []
        lines += [
            f"  {verb:20}{textwrap.shorten(command_summary(place), 78, placeholder=' …')}"
            for verb, place in in_package.items()
        ]
    return "\n".join(lines)


def command_summary(place: str) -> str:
    """The first sentence of a command's docstring, parsed since the import may need torch."""
    module, name = place.split(":")
    source = Path(__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            paragraph = (ast.get_docstring(node) or "").split("\n\n")[0]
            return " ".join(paragraph.split()).split(". ")[0].removesuffix(".")
    return ""


def unknown_command_message(verb: str, words: Sequence[str]) -> str:
    """The error message for an unknown command; the usage for none."""
    subcommands = [name for name in commands() if name.startswith(f"{verb} ")]
    if not verb or (subcommands and not words):
        return format_usage(subcommands)
    name = f"{verb} {words[0]}" if subcommands else verb
    near = difflib.get_close_matches(name, subcommands or commands(), 1)
    hint = f"; the nearest is '{near[0]}'" if near else ""
    return f"unknown command '{name}'{hint}; olmo --help lists all"


def parse_arguments(name: str, command: Callable[..., Any], words: Sequence[str]) -> dict[str, Any]:
    """Parse a command line by the signature of `command`. Returns its arguments and `log`."""
    function = command.build if isinstance(command, Stage) else command
    text = inspect.getdoc(function) or ""
    parser = argparse.ArgumentParser(
        prog=f"olmo {name}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    hints = typing.get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        if parameter_role(hints[parameter.name]) != "work":
            add_argument(parser, parameter, hints[parameter.name])
    parser.add_argument("--log", type=Path, help="also write messages to this file")
    return vars(parser.parse_args(words))


def positional_parameters(command: Callable[..., Any]) -> list[str]:
    """The names of positional-only parameters."""
    parameters = inspect.signature(command).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_ONLY]


def add_argument(parser: argparse.ArgumentParser, parameter: inspect.Parameter, hint: Any) -> None:
    """Add the argument of a parameter, by its kind, default and type."""
    required = parameter.default is inspect.Parameter.empty
    is_positional = required and parameter.kind is inspect.Parameter.POSITIONAL_ONLY
    flag = parameter.name if is_positional else "--" + parameter.name.replace("_", "-")
    options: dict[str, Any] = {} if is_positional else {"required": required}
    options["default"] = None if required else parameter.default
    kind, is_list = element_type(hint)
    if dataclasses.is_dataclass(kind):
        options["type"] = functools.partial(parse_section, kind)
        options["metavar"] = "JSON"
    elif kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif is_list:
        options |= {"type": kind, "nargs": "*"}
        if is_positional:
            options["default"] = []
    else:
        options["type"] = kind
    parser.add_argument(flag, **options)


def parse_section(kind: Any, text: str) -> Any:
    """A recipe's section from JSON. argparse shows the message of an ArgumentTypeError only."""
    try:
        return kind.new(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def element_type(hint: Any) -> tuple[Any, bool]:
    """A parameter's type without Annotated, None and list, and whether it is a list."""
    if typing.get_origin(hint) is typing.Annotated:
        return element_type(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return element_type(next(a for a in typing.get_args(hint) if a is not type(None)))
    if typing.get_origin(hint) in (list, tuple):
        return element_type(typing.get_args(hint)[0])[0], True
    return hint, False


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
    try:
        yield
    except BaseException as error:
        with suppress(OSError), log.open("a") as file:  # the disk may be what failed
            if isinstance(error, Exception) and not isinstance(error, Paused):
                file.writelines(map(redact, traceback.format_exception(error)))
            reason = describe_error(error) if isinstance(error, Exception) else error
            file.write(redact(f"{FAILED}{type(error).__name__}: {reason}\n"))
        raise


if __name__ == "__main__":
    main()
