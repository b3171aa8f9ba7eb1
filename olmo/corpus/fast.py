"""The engine `fast`: the toolkit's bytes at several times its speed.

It encodes with olmo.corpus.encoding. The toolkit itself tokenizes the documents that encoding
rejects, and a share of the shards once more, to compare.
"""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from olmo.corpus.documents import hash_number, parse_document
from olmo.corpus.dolma import Dolma, scratch_folder
from olmo.corpus.encoding import ENCODERS, GIGATOKEN, make_encoder
from olmo.corpus.engine import TokenizeJob, token_ranges
from olmo.io import gz

if TYPE_CHECKING:
    import polars


class Fast:
    """The engine. Documents that it cannot reproduce, and files that it audits, go to the toolkit.

    Args:
        dolma: the toolkit, which starts only when it is needed.
        audit_share: the share of files, chosen by a hash of their contents, that the toolkit
            tokenizes too, to compare.
        encoder: one of ENCODERS, the first library to try.
    """

    def __init__(self, dolma: Dolma, audit_share: float = 0.01, encoder: str = GIGATOKEN) -> None:
        self.dolma = dolma
        self.audit_share = audit_share
        self.encoder = encoder
        self.toolkit = f"fast==2 {library_versions(encoder)} beside {dolma.toolkit}"

    def tokenize(self, job: TokenizeJob) -> tuple[polars.DataFrame, str]:
        """Write a file's tokens; the documents' ranges, and a message.

        Raises ValueError for a tokenizer that does not qualify, and for an audit that fails.
        """
        import numpy as np

        encode = make_encoder(job.tokenizer.read_bytes(), job.special_as_text, self.encoder)
        end = np.array([job.eos_token_id], job.dtype).tobytes()
        ids: list[str] = []
        lengths: list[int] = []
        left: list[int] = []  # the rows of documents that are left to the toolkit
        left_bytes = 0
        with scratch_folder(job.tokens) as folder:
            with (
                gz.reading(job.documents) as lines,
                gz.writing(folder / "left.gz") as left_lines,
                open(folder / "tokens", "wb", gz.BUFFER_BYTES) as output,
            ):
                for line in lines:
                    identity, text, reason = parse_document(line)
                    if reason is not None or identity is None or text is None:
                        raise ValueError(
                            f"line {len(ids) + 1}: expected a document, found {reason}"
                        )
                    found = encode(text.strip())
                    if found is None:
                        left.append(len(ids))
                        left_bytes += len(text.encode())
                        left_lines.write(line)
                        lengths.append(0)
                    else:
                        output.write(np.asarray(found, job.dtype).data)
                        lengths.append(len(found))
                        if found[-1] != job.eos_token_id:
                            output.write(end)
                            lengths[-1] += 1
                    ids.append(identity)
            if left:
                rest = replace(
                    job,
                    documents=folder / "left.gz",
                    tokens=folder / "left",
                    text_bytes=left_bytes,
                    count=len(left),
                )
                theirs, toolkit_output = self.dolma.tokenize(rest)
                if theirs["id"].to_list() != [ids[row] for row in left]:
                    raise ValueError(
                        f"expected {len(left):,} documents from the toolkit, its input, "
                        f"found {theirs.height:,}: {toolkit_output}"
                    )
                sizes = dict(zip(left, theirs["end"] - theirs["start"], strict=True))
                insert_tokens(job, folder, lengths, sizes)
            else:
                os.replace(folder / "tokens", job.tokens)

        ranges = token_ranges(range(1, len(ids) + 1), ids, lengths)
        audited = self.is_audited(job)
        if audited:
            self.audit(job, ranges)
        return ranges, f"{len(left)} of {len(ids)} documents left to the toolkit" + (
            ", all audited" * audited
        )

    def is_audited(self, job: TokenizeJob) -> bool:
        """Whether the toolkit tokenizes this file too: by a hash of the file's beginning."""
        with open(job.documents, "rb") as file:
            return hash_number(file.read(gz.BUFFER_BYTES)) < self.audit_share * 2**64

    def audit(self, job: TokenizeJob, ranges: polars.DataFrame) -> None:
        """Raises ValueError if the toolkit gives other tokens."""
        import numpy as np

        with scratch_folder(job.tokens) as folder:
            expected, _ = self.dolma.tokenize(replace(job, tokens=folder / "tokens"))
            theirs = np.memmap(folder / "tokens", job.dtype, mode="r")
            ours = np.memmap(job.tokens, job.dtype, mode="r")
            if expected.equals(ranges) and np.array_equal(ours, theirs):
                return
            for mine, other in zip(
                ranges.iter_rows(named=True), expected.iter_rows(named=True), strict=False
            ):
                if mine != other or not np.array_equal(
                    ours[mine["start"] : mine["end"]], theirs[other["start"] : other["end"]]
                ):
                    break
        raise ValueError(
            f"the engine `fast` failed its audit: document {mine['id']!r} has other tokens than "
            "from the toolkit. Use the engine `dolma`, and report the document to us"
        )


def insert_tokens(job: TokenizeJob, folder: Path, lengths: list[int], left: dict[int, int]) -> None:
    """Insert the toolkit's documents (row → length) between ours; updates `lengths`."""
    import numpy as np

    ours, theirs = (np.fromfile(folder / name, job.dtype) for name in ("tokens", "left"))
    at = {True: 0, False: 0}
    with open(job.tokens, "wb") as output:
        for row in range(len(lengths)):
            is_left = row in left
            if is_left:
                lengths[row] = left[row]
            source, start = theirs if is_left else ours, at[is_left]
            at[is_left] = start + lengths[row]
            output.write(source[start : at[is_left]].tobytes())


def library_versions(encoder: str) -> str:
    """The versions of the libraries that may encode."""
    names = ENCODERS[ENCODERS.index(encoder) :]
    try:
        return " ".join(f"{name}=={version(name)}" for name in names)
    except PackageNotFoundError as error:
        raise ValueError(
            f"the engine `fast` needs {error.name}: uv pip install {error.name}; or use the "
            "engine `dolma`"
        ) from error
