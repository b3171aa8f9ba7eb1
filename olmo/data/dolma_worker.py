"""Runs inside the tokenizing toolkit's own environment: `dolma tokens` for one file after another.

Imports nothing of ours. Started once for a batch, because importing dolma takes seconds. Reads a
request a line from stdin, {"folder", "documents", "tokenizer", …}, and answers a line, {} or
{"error", "errno"}. What dolma says goes to stderr.
"""

import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path


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


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)  # not inherited; what dolma prints goes to 2
    os.dup2(2, 1)
    versions = {name: version(name) for name in ("dolma", "tokenizers")}
    print(json.dumps(versions), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        os.chdir(request.pop("folder"))
        tempfile.tempdir = os.getcwd()
        # dolma looks for nltk's data on import and tries to download what it never uses: an
        # empty folder of that name answers the look.
        Path("nltk_data/tokenizers/punkt").mkdir(parents=True)
        os.environ["NLTK_DATA"] = os.path.abspath("nltk_data")
        try:
            tokenize(**request)
            answer = {}
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            answer = {"error": said, "errno": getattr(error, "errno", None)}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
