"""The commands of `olmo`: where each is, and its command line.

The flags are the parameters of the command's function: `keep_one_in: int = 1` is `--keep-one-in 1`.
A command's module is imported only when it is called, so that `olmo order` does not import torch.
"""

import argparse
import dataclasses
import difflib
import functools
import importlib
import inspect
import json
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from olmo.store.stage import Stage, parameter_role
from olmo.usage import STAGE_OPTIONS, fill_paragraphs, parse_docstring

# What people type: heading → command → "module:function".
USER_COMMANDS = {
    "from text to a run": {
        "new": "olmo.pipeline.new:new",
        "check": "olmo.pipeline.check:check",
        "plan": "olmo.pipeline.forecast_text:plan",
    },
    "runs": {
        "runs": "olmo.report.runs:runs",
        "watch": "olmo.report.watch:watch",
        "chat": "olmo.inspect.chat:chat",
        "generate": "olmo.inspect.generate:generate_text",
        "diff": "olmo.report.diff:diff",
        "fork": "olmo.pipeline.fork:fork",
        "inspect": "olmo.inspect.commands:inspect",
        "seen": "olmo.inspect.commands:seen",
        "replay": "olmo.inspect.replay:replay",
        "blame": "olmo.report.blame_page:blame",
        "compare": "olmo.report.compare:compare",
        "ladder": "olmo.pipeline.ladder_report:ladder",
        "ladder check": "olmo.pipeline.ladder_report:ladder_check",
        "scores": "olmo.report.scores:scores",
        "report": "olmo.report.pages:report",
        "checkpoint convert": "olmo.pipeline.convert:convert",
        "certificate make": "olmo.certificate.make:make",
        "certificate verify": "olmo.certificate.verify:verify",
    },
    "the store": {
        "store trace": "olmo.store.commands:trace",
        "store why": "olmo.store.commands:why",
        "store affected": "olmo.inspect.affected:affected",
        "store verify": "olmo.store.commands:verify",
        "store gc": "olmo.store.commands:gc",
        "store pin": "olmo.store.commands:pin",
        "store checkout": "olmo.store.commands:checkout",
        "store push": "olmo.store.commands:push",
        "store pull": "olmo.inspect.pull:pull",
    },
    "this machine": {
        "bench": "olmo.report.bench:bench",
        "completion": "olmo.completion:completion",
    },
}
# What rules call. A module of olmo/corpus with a function `batch` is the stage of its name, too.
STAGES = {
    "source-list": "olmo.corpus.sources:source_list",
    "sources": "olmo.corpus.ingest:sources",
    "given-tokens": "olmo.corpus.ingest:given_tokens",
    "environment": "olmo.corpus.environments:environment",
    "order": "olmo.corpus.order:order",
    "positions": "olmo.corpus.order:positions",
    "skip": "olmo.corpus.skip:skip",
    "clusters": "olmo.corpus.duplicates:batch_clusters",
    "references": "olmo.corpus.digests:batch_references",
    "start": "olmo.pipeline.start:start",
    "train": "olmo.pipeline.train:train_run",
    "soup": "olmo.pipeline.soup:soup",
    "hf": "olmo.pipeline.export:hf",
    "heldout": "olmo.pipeline.evaluate:heldout",
    "quality": "olmo.report.quality_page:quality",
    "docstrings": "olmo.pipeline.evaluate:docstrings",
    "evaluate": "olmo.pipeline.evaluate:evaluate",
}


@functools.cache
def command_groups() -> dict[str, dict[str, str]]:
    """USER_COMMANDS, and last the stages. No module is imported."""
    found = {}
    for path in sorted(Path(__file__).parent.joinpath("corpus").glob("*.py")):
        if "\ndef batch(" in path.read_text(encoding="utf-8"):
            found[path.stem.replace("_", "-")] = f"olmo.corpus.{path.stem}:batch"
    return USER_COMMANDS | {"stages, which snakemake calls": found | STAGES}


@functools.cache
def commands() -> dict[str, str]:
    """Command → "module:function"."""
    return {verb: place for group in command_groups().values() for verb, place in group.items()}


def load_command(verb: str) -> Callable[..., Any]:
    """The function of a command; imports its module."""
    module, name = commands()[verb].split(":")
    command: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return command


def bind(
    verb: str, command: Callable[..., Any], words: Sequence[str]
) -> tuple[Path | None, Callable[[], Any]]:
    """A command line's --log, and the call that it stands for."""
    arguments = vars(build_parser(verb, command).parse_args(words))
    log = arguments.pop("log")
    positional = [arguments.pop(name) for name in positional_parameters(command)]
    return log, functools.partial(command, *positional, **arguments)


class Parser(argparse.ArgumentParser):
    """A parser whose error is one sentence, with the nearest option for an unknown one."""

    def error(self, message: str) -> NoReturn:
        if found := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            known = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(found[1], known, 1)
            message = f"unknown option {found[1]}" + "".join(f"; the nearest is {n}" for n in near)
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help shows all options\n")


def build_parser(verb: str, command: Callable[..., Any]) -> Parser:
    """The parser of a command, by the signature and the docstring of its function."""
    function = command.build if isinstance(command, Stage) else command
    usage = parse_docstring(inspect.getdoc(function) or "")
    common = {} if any(verb in group for group in USER_COMMANDS.values()) else STAGE_OPTIONS
    parser = Parser(
        prog=f"olmo {verb}",
        description=fill_paragraphs(usage.description),
        epilog="examples:\n" + textwrap.indent(usage.examples, "  ") if usage.examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    hints = typing.get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        if parameter_role(hints[parameter.name]) != "work":
            meaning = (common | usage.options).get(parameter.name, "")
            add_argument(parser, parameter, hints[parameter.name], meaning)
    parser.add_argument("--log", type=Path, help="also write messages to this file")
    return parser


def positional_parameters(command: Callable[..., Any]) -> list[str]:
    """The names of positional-only parameters."""
    parameters = inspect.signature(command).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_ONLY]


def add_argument(
    parser: argparse.ArgumentParser, parameter: inspect.Parameter, hint: Any, meaning: str
) -> None:
    """Add the argument of a parameter, by its kind, default and type; `meaning` is its help."""
    required = parameter.default is inspect.Parameter.empty
    is_positional = required and parameter.kind is inspect.Parameter.POSITIONAL_ONLY
    # `from_` is --from, which is a word of Python's.
    flag = "--" + parameter.name.rstrip("_").replace("_", "-")
    options: dict[str, Any] = {"required": required, "dest": parameter.name}
    if is_positional:
        flag, options = parameter.name, {}
    options["default"] = None if required else parameter.default
    default = "" if options["default"] in (None, False, (), "") else f" ({parameter.default})"
    options["help"] = f"{meaning}{default}".replace("%", "%%")
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
    """A recipe's section from JSON; "-": from the standard input, since an argument has 128 KiB.

    argparse shows the message of an ArgumentTypeError only.
    """
    try:
        return kind.new(**json.loads(sys.stdin.read() if text == "-" else text))
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
