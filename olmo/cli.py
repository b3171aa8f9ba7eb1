"""`olmo <command>`: every stage and every tool, one verb each.

A stage's flags come from its function's signature: `keep_one_in: int = 1` is `--keep-one-in 1`.
Commands are imported when they are called, so that `olmo order` does not wait for torch.
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
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from olmo.runtime.log import FAILED, LOG_ENV, describe_error
from olmo.runtime.process import EXIT_PAUSED, Paused, die_with_supervisor
from olmo.runtime.urls import redact, stash_secrets
from olmo.store.stage import Stage, parameter_role, require_store

# A module of olmo/corpus with a function `batch` is a command of the module's name. The others:
ELSEWHERE = {
    "source-list": "olmo.corpus.sources:source_list",
    "sources": "olmo.corpus.ingest:sources",
    "given-tokens": "olmo.corpus.ingest:given_tokens",
    "order": "olmo.corpus.order:order",
    "positions": "olmo.corpus.order:positions",
    "environment": "olmo.corpus.environments:environment",
    "start": "olmo.pipeline.start:start",
    "train": "olmo.pipeline.train:train",
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
# What the commands are for, by their packages.
GROUPS = {
    "corpus": "from sources to tokens",
    "pipeline": "from tokens to a checkpoint, and what it is worth",
    "inspect": "looking into it",
    "report": "beside it",
    "store": "the store",
}


@functools.cache
def commands() -> dict[str, str]:
    """verb → "module:function", of all commands; none is imported."""
    found = {}
    for path in sorted(Path(__file__).parent.joinpath("corpus").glob("*.py")):
        if "\ndef batch(" in path.read_text(encoding="utf-8"):
            found[path.stem.replace("_", "-")] = f"olmo.corpus.{path.stem}:batch"
    return found | ELSEWHERE


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; an error that its user can mend is one sentence and exit status 1.

    Training that was asked to stop and has saved exits with 75: the same command goes on.
    """
    # A word with spaces is a text, which stays as it is.
    given = sys.argv[1:] if argv is None else argv
    words = [word if " " in word else stash_secrets(word) for word in given]
    verb = words.pop(0) if words else ""
    if words and f"{verb} {words[0]}" in commands():  # olmo store verify
        verb = f"{verb} {words.pop(0)}"
    try:
        try:
            run(verb, words)
        finally:
            sys.stdout.flush()  # a reader who left (`| head`) is noticed here at the latest
    except Paused as pause:
        print(f"olmo {verb}: {pause}", file=sys.stderr)
        sys.exit(EXIT_PAUSED)
    except KeyboardInterrupt:
        print(f"olmo {verb}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        if not readers_left():
            raise
        # As Python's documentation has it: what would be flushed at exit goes nowhere.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        sys.exit(redact(f"olmo {verb}: {describe_error(error)}"))
    except Exception as error:
        if LOG_ENV not in os.environ:
            raise
        sys.exit(
            redact(
                f"olmo {verb}: a fault of olmo's own, {type(error).__name__}: {error}; the "
                f"traceback is in {os.environ[LOG_ENV]}"
            )
        )


def run(verb: str, words: Sequence[str]) -> None:
    if verb not in commands() and {"-h", "--help"} & {verb, *words[:1]}:
        print(usage([name for name in commands() if name.startswith(f"{verb} ")]))
        return
    if verb == "--version":
        print(f"olmo {version('olmo')}")
        return
    if verb not in commands():
        sys.exit(unknown(verb, words))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and so clean up
    # A scheduler's warning that time is up soon: training heeds it, the rest uses the time.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    module, name = commands()[verb].split(":")
    command = getattr(importlib.import_module(module), name)
    die_with_supervisor()
    arguments = parse(verb, command, words)
    if verb.startswith("store ") and verb != "store pull":  # which may make one
        require_store()
    with copied_to(arguments.pop("log")):
        first = [arguments.pop(name) for name in positional(command)]
        command(*first, **arguments)


def readers_left() -> bool:
    """Whether who read our stdout or stderr went away; another pipe may have broken as well."""
    streams = select.poll()
    for stream in (sys.stdout, sys.stderr):
        streams.register(stream.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in streams.poll(0))


def usage(verbs: Sequence[str] = ()) -> str:
    """Commands with what they do, without importing any; all of them unless some are named."""
    lines = ["usage: olmo <command> [--help]"]
    for package, purpose_of in GROUPS.items():
        inside = {
            verb: place
            for verb, place in sorted(commands().items())
            if (verb.split()[0] if verb.startswith("store ") else place.split(".")[1]) == package
            and (not verbs or verb in verbs)
        }
        lines += ["", f"{purpose_of}:"] if inside and not verbs else []
        lines += [
            f"  {verb:20}{textwrap.shorten(purpose(place), 78, placeholder=' …')}"
            for verb, place in inside.items()
        ]
    return "\n".join(lines)


def purpose(place: str) -> str:
    """The first sentence of a command's text: read, since some modules import torch."""
    module, name = place.split(":")
    source = Path(__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            paragraph = (ast.get_docstring(node) or "").split("\n\n")[0]
            return " ".join(paragraph.split()).split(". ")[0].removesuffix(".")
    return ""


def unknown(verb: str, words: Sequence[str]) -> str:
    """What to say of a command that there is not."""
    inner = [name for name in commands() if name.startswith(f"{verb} ")]
    if not verb or (inner and not words):
        return usage(inner)
    asked = f"{verb} {words[0]}" if inner else verb
    near = difflib.get_close_matches(asked, inner or commands(), 1)
    hint = f"; the nearest is '{near[0]}'" if near else ""
    return f"no command '{asked}'{hint}. All of them: olmo --help"


def parse(name: str, command: Callable[..., Any], words: Sequence[str]) -> dict[str, Any]:
    """The arguments of `command` from a command line, by its signature."""
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
    parser.add_argument("--log", type=Path, help="also write what is said to this file")
    return vars(parser.parse_args(words))


def positional(command: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(command).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_ONLY]


def add_argument(parser: argparse.ArgumentParser, parameter: inspect.Parameter, hint: Any) -> None:
    required = parameter.default is inspect.Parameter.empty
    positional = required and parameter.kind is inspect.Parameter.POSITIONAL_ONLY
    flag = parameter.name if positional else "--" + parameter.name.replace("_", "-")
    options: dict[str, Any] = {} if positional else {"required": required}
    options["default"] = None if required else parameter.default
    kind, many = kind_of(hint)
    if dataclasses.is_dataclass(kind):
        options["type"] = functools.partial(section, kind)
        options["metavar"] = "JSON"
    elif kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif many:
        options |= {"type": kind, "nargs": "*"}
        if positional:
            options["default"] = []
    else:
        options["type"] = kind
    parser.add_argument(flag, **options)


def section(kind: Any, text: str) -> Any:
    """A recipe's section from its JSON; argparse shows the reason of this kind of error alone."""
    try:
        return kind.new(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def kind_of(hint: Any) -> tuple[Any, bool]:
    """(int, str, Path …, whether a list of it) for a parameter's type."""
    if typing.get_origin(hint) is typing.Annotated:
        return kind_of(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return kind_of(next(a for a in typing.get_args(hint) if a is not type(None)))
    if typing.get_origin(hint) in (list, tuple):
        return kind_of(typing.get_args(hint)[0])[0], True
    return hint, False


class copied_to:
    """What this process and its children say goes to a log file as well as to the terminal.

    A `tee` of our own making would make the terminal a pipe and so take the progress bar away:
    only the lines that olmo.runtime.log writes are copied, through $OLMO_LOG.
    """

    def __init__(self, log: Path | None) -> None:
        self.log = log

    def __enter__(self) -> None:
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self.log.write_text("")
            os.environ[LOG_ENV] = str(self.log.resolve())

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        if self.log is not None and error is not None:
            with suppress(OSError), self.log.open("a") as file:  # as may be what failed
                if isinstance(error, Exception) and not isinstance(error, Paused):
                    file.writelines(map(redact, traceback.format_exception(error)))
                why = describe_error(error) if isinstance(error, Exception) else error
                file.write(redact(f"{FAILED}{kind.__name__}: {why}\n"))


if __name__ == "__main__":
    main()
