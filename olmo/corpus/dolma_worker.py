"""Runs inside the toolkit's own environment: `dolma tokens`, `dedupe`, `mix`, one after another.

Imports nothing of ours. Started once for a batch, because importing dolma takes seconds. Reads a
request a line from stdin, {"verb", "folder", "documents", …}, and answers a line, {} or
{"error", "errno"}. What dolma says goes to stderr.
"""

import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

# `dedupe` and `mix` download what is not here into these; all of ours is.
WORK = {"work_dir": {"input": "work/input", "output": "work/output"}, "processes": 1}
AS_NAMED = {"compression": {"input": None, "output": None}}  # by a file's ending


def tokenize(
    documents: str,
    tokenizer: str,
    eos_token_id: int,
    pad_token_id: int,
    encode_special_tokens: bool,
    dtype: str,
    max_size: int,
) -> None:
    """`dolma tokens` on `documents`, which makes parts/part-*.npy and .csv.gz in this folder."""
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
            debug=True,  # in this process: no pool, each of whose workers would import dolma again
        )
    )


def dedupe(
    documents: list[str],
    name: str,
    by: str,
    bloom_filter: str,
    read_only: bool = False,
    ngram: int = 0,
    least: float = 1.0,
) -> None:
    """`dolma dedupe` on files <folder>/documents/…, which makes <folder>/attributes/`name`/….

    An attribute `name` tells the spans, in characters, that were in the filter before. `by` text:
    the whole document; by paragraphs: its lines; by ngrams: lines of which the share `least` of
    the n-grams was there. What was not there is put into it, unless that is `read_only`. One
    thread takes the files in order.
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
    # min_words and min_length stay 0: with the first nothing is ever found, and the second
    # looks at where a paragraph ends, not at how long it is.
    deduper(
        {
            **WORK,
            **AS_NAMED,
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
                # The file that is there says how large it is.
                "size_in_bytes": 1,
                "estimated_doc_count": 0,
                "desired_false_positive_rate": 0.0,
            },
            "is_s3_volume": False,
        }
    )


def mix(documents: list[str], attributes: list[str], exclude: list[str], cut: list[str]) -> None:
    """`dolma mix` on files <folder>/documents/…, which makes mixed/documents/… of the same names.

    A document that has an attribute of `exclude` is left out; the spans of attributes `cut` are
    taken out of its text.
    """
    from dolma import mixer

    cut_out = {"min_score": 0, "replacement": "", "syntax": "jsonpath"}
    stream = {
        **AS_NAMED,
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
    mixer({**WORK, "streams": [stream], "shuffle": False})  # not shuffled: a file for each


VERBS: dict[str, Any] = {"tokens": tokenize, "dedupe": dedupe, "mix": mix}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)  # not inherited; what dolma prints goes to 2
    os.dup2(2, 1)
    versions = {name: version(name) for name in ("dolma", "tokenizers")}
    print(json.dumps(versions), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        verb = VERBS[request.pop("verb")]
        os.chdir(request.pop("folder"))
        tempfile.tempdir = os.getcwd()
        # dolma looks for nltk's data on import and tries to download what it never uses: an
        # empty folder of that name answers the look.
        Path("nltk_data/tokenizers/punkt").mkdir(parents=True, exist_ok=True)
        os.environ["NLTK_DATA"] = os.path.abspath("nltk_data")
        try:
            verb(**request)
            answer = {}
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            answer = {"error": said, "errno": getattr(error, "errno", None)}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
