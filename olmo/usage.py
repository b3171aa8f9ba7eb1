"""What `olmo <command> --help` says, from the docstring of the command's function.

Its first sentence is the summary. "Args:" describes the options, an indented "name: text" each, and
"Example:" has command lines. "Raises" and "Returns" are for callers of the function.
"""

import re
import textwrap
from dataclasses import dataclass
from shutil import get_terminal_size

# What options of stages mean, unless the stage's own docstring has them: snakemake gives them all.
STAGE_OPTIONS = {
    "after": "folder of the chain's link to continue",
    "allow_missing": "leave out files that are not available",
    "checkpoint": "folder of a final checkpoint",
    "config": "the recipe's section of this stage",
    "documents": "listings of documents, or their files",
    "dtype": "type of the token ids: uint16 or uint32",
    "environment": "JSON file of the environment that `requirements` made",
    "eos_token_id": "id of the end-of-text token",
    "final": "folder of the final checkpoint to write",
    "folder": "folder to write",
    "kind": "what a line of the sources is: text or messages",
    "listing": "table to write, which names what this job made",
    "order": "file with the order of the instances",
    "pad_token_id": "id of the padding token",
    "parallel": "files that are downloaded at once",
    "requirements": "file with the pinned packages of an environment",
    "results": "file or folder of results to write",
    "seed": "seed of the order",
    "sources": "source files, each name=place or name=place#mirror",
    "table": "table of sources: url, bytes, sha256, licence",
    "tokenizer": "tokenizer.json of the data set",
    "tokens": "listings of token files, or the files",
    "url": "URL of a published list of files",
}


@dataclass(frozen=True)
class Usage:
    """A docstring's parts."""

    description: str  # paragraphs, the first sentence first
    options: dict[str, str]  # parameter → help
    examples: str  # command lines; "" if there are none

    @property
    def summary(self) -> str:
        """The first sentence, without its full stop."""
        paragraph = " ".join(self.description.split("\n\n")[0].split())
        return paragraph.split(". ")[0].removesuffix(".")


def parse_docstring(text: str) -> Usage:
    """The parts of a docstring, without indentation as `inspect.getdoc` gives it."""
    sections: dict[str, list[str]] = {"": []}
    name = ""
    for paragraph in text.split("\n\n"):
        heading = re.match(r"(Args|Examples?|Raises|Returns)\b:?", paragraph)
        name = heading[1].removesuffix("s") if heading else ""
        body = paragraph[heading.end() :].strip("\n") if heading else paragraph
        sections.setdefault(name, []).append(body)
    options = re.findall(
        r"^(\w+): (.*(?:\n  .*)*)", textwrap.dedent("\n".join(sections.get("Arg", ()))), re.M
    )
    return Usage(
        "\n\n".join(sections[""]),
        {name: " ".join(meaning.split()) for name, meaning in options},
        textwrap.dedent("\n".join(sections.get("Example", ()))).strip(),
    )


def fill_paragraphs(text: str) -> str:
    """Paragraphs wrapped to the terminal's width."""
    return "\n\n".join(fill(" ".join(part.split())) for part in text.split("\n\n"))


def fill(text: str, indent: str = "") -> str:
    """A text wrapped to the terminal's width; lines after the first begin with `indent`."""
    width = min(get_terminal_size().columns, 100)
    return textwrap.fill(text, width, subsequent_indent=indent, break_on_hyphens=False)
