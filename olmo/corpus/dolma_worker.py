"""Runs `dolma tokens`, `dedupe`, `mix` and `tag` inside the toolkit's own environment.

Imports nothing of ours. One process serves a batch, since importing dolma takes seconds. It reads
one request per line from stdin, {"verb", "folder", "documents", …}, and writes one reply per line
to stdout, {} or {"error", "errno"}. dolma's own output goes to stderr.
"""

import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

# `dedupe` and `mix` would download remote files into these folders; ours are local.
WORK = {"work_dir": {"input": "work/input", "output": "work/output"}, "processes": 1}
BY_SUFFIX = {"compression": {"input": None, "output": None}}  # by the file name


def run_tokens(
    documents: str,
    tokenizer: str,
    eos_token_id: int,
    pad_token_id: int,
    encode_special_tokens: bool,
    dtype: str,
    max_size: int,
) -> None:
    """`dolma tokens` on `documents`; it writes parts/part-*.npy and .csv.gz in this folder."""
    from dolma.cli.tokenizer import TokenizationConfig, TokenizerCli, TokenizerConfig

    TokenizerCli.run(
        TokenizationConfig(
            documents=[documents],
            destination="parts",
            tokenizer=TokenizerConfig(
                name_or_path=tokenizer,
                eos_token_id=eos_token_id,
                pad_token_id=pad_token_id,
                encode_special_tokens=encode_special_tokens,
            ),
            dtype=dtype,
            max_size=max_size,
            processes=1,
            ring_size=1,
            batch_size=256,  # documents held in memory, as Python lists, and shuffled
            debug=True,  # in this process: each worker of a pool would import dolma again
        )
    )


def run_dedupe(
    documents: list[str],
    name: str,
    by: str,
    bloom_filter: str,
    read_only: bool = False,
    ngram: int = 0,
    least: float = 1.0,
) -> None:
    """`dolma dedupe` on files <folder>/documents/…; it writes <folder>/attributes/`name`/….

    The attribute `name` has the spans, in characters, that the filter already had. `by` text: the
    whole document; by paragraphs: its lines; by ngrams: lines of whose n-grams it had the share
    `least`. New ones are added to the filter, unless it is `read_only`. One thread processes the
    files in order.
    """
    from dolma import deduper

    paragraphs: dict[str, Any] = {"attribute_name": name, "paragraph_separator": "\n"}
    paragraphs["by_ngram"] = None
    if by == "ngrams":
        paragraphs["by_ngram"] = {
            "ngram_length": ngram,
            "stride": 0,
            "overlap_threshold": least,
            "skip_short_paragraphs": True,
        }
    whole = {"documents": {"attribute_name": name, "key": "$.text"}}
    # min_words and min_length stay 0: the first, if set, disables all matches; the second compares
    # the position where a paragraph ends, not its length.
    deduper(
        {
            **WORK,
            **BY_SUFFIX,
            "documents": documents,
            "dedupe": {
                "name": name,
                **(whole if by == "text" else {"paragraphs": paragraphs}),
                "skip_empty": True,
                "min_length": 0,
                "min_words": 0,
                "num_partitions": 1,
                "partition_index": 0,
                "file_partition": False,
                "document_dir": "documents",
            },
            "bloom_filter": {
                "file": bloom_filter,
                "read_only": read_only,
                # The filter file exists, and its header has its size.
                "size_in_bytes": 1,
                "estimated_doc_count": 0,
                "desired_false_positive_rate": 0.0,
            },
            "is_s3_volume": False,
        }
    )


def run_mixer(
    documents: list[str], attributes: list[str], exclude: list[str], cut: list[str]
) -> None:
    """`dolma mix` on files <folder>/documents/…; it writes mixed/documents/… of the same names.

    Drops documents with an attribute of `exclude`, and removes the spans of attributes `cut` from
    the text of the others.
    """
    from dolma import mixer

    cut_out = {"min_score": 0, "replacement": "", "syntax": "jsonpath"}
    stream = {
        **BY_SUFFIX,
        "name": "mixed",
        "documents": documents,
        "attributes": attributes,
        "filter": {
            "include": [],
            "exclude": [f".attributes.{name} // [] | length > 0" for name in exclude],
            "syntax": "jq",
        },
        "span_replacement": [{**cut_out, "span": f"$.attributes.{name}"} for name in cut],
        "output": {"path": "mixed", "max_size_in_bytes": 1 << 60},
    }
    mixer({**WORK, "streams": [stream], "shuffle": False})  # not shuffled: one output per file


def run_tagger(documents: str, taggers: list[str], models: dict[str, str]) -> None:
    """`dolma tag` on <folder>/documents/…; it writes <folder>/attributes/`tagger`/… for each.

    `models`: tagger → the file that it would download, a fastText model or a tokenizer.
    """
    from dolma.cli.tagger import TaggerCli, TaggerConfig
    from dolma.core.registry import TaggerRegistry
    from tokenizers import Tokenizer

    for tagger, path in models.items():
        kind: Any = TaggerRegistry.get(tagger)
        if hasattr(kind, "TOKENIZER_IDENTIFIER"):
            kind.__init__ = lambda self, path=path: setattr(
                self, "tokenizer", Tokenizer.from_file(path)
            )
        else:
            kind.MODEL_PATH = path
    # In this process (debug): each worker of a pool would import dolma again.
    TaggerCli.run(TaggerConfig(documents=[documents], taggers=taggers, processes=1, debug=True))


VERBS: dict[str, Any] = {
    "tokens": run_tokens,
    "dedupe": run_dedupe,
    "mix": run_mixer,
    "tag": run_tagger,
}


def main() -> None:
    # A copy of stdout that dolma's processes do not inherit; what dolma prints goes to stderr.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    versions = {name: version(name) for name in ("dolma", "tokenizers")}
    print(json.dumps(versions), file=replies)
    for line in sys.stdin:
        request = json.loads(line)
        verb = VERBS[request.pop("verb")]
        os.chdir(request.pop("folder"))
        tempfile.tempdir = os.getcwd()
        # On import, dolma downloads nltk's data if their folder is missing, though it never uses
        # them here. An empty folder prevents that.
        Path("nltk_data/tokenizers/punkt").mkdir(parents=True, exist_ok=True)
        os.environ["NLTK_DATA"] = os.path.abspath("nltk_data")
        try:
            verb(**request)
            reply = {}
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            reply = {"error": message, "errno": getattr(error, "errno", None)}
        print(json.dumps(reply), file=replies)


if __name__ == "__main__":
    main()
