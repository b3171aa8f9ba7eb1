"""Which documents are good enough: the toolkit's taggers, and conditions on the tags they give.

A tag is a list of spans of a document, [start, end, value], under a name of three parts:
gopher_v1__gopher_v1__word_count. The toolkit rounds values to five digits.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from olmo.config import BaseConfig
from olmo.corpus.dedupe import QUALITY, Spans, read_marks, write_marks
from olmo.corpus.documents import PARQUET
from olmo.io import gz
from olmo.store.stage import Facts, Input, Output, stage

GOPHER = (
    *(f"fraction_of_characters_in_most_common_{n}grams" for n in range(2, 5)),
    *(f"fraction_of_characters_in_duplicate_{n}grams" for n in range(5, 11)),
    *("character_count", "word_count", "median_word_length", "symbol_to_word_ratio"),
    *("fraction_of_words_with_alpha_character", "required_word_count"),
    "fraction_of_lines_starting_with_bullet_point",
    "fraction_of_lines_ending_with_ellipsis",
    "fraction_of_duplicate_lines",
    "fraction_of_characters_in_duplicate_lines",
)
# Tags with a * are spans of what was found, none or many; others are one number a document.
C4 = (
    *("has_curly_brace*", "has_javascript*", "has_lorem_ipsum*", "has_naughty_word*", "line_count"),
    *("lines_with_no_ending_punctuation*", "lines_with_too_few_words*"),
)
PII = ("EMAIL_ADDRESS*", "PHONE_NUMBER*", "IP_ADDRESS*")
REPETITIONS = ("repetition*", *(f"doc_{n}_repetition" for n in ("frac", "max_length", "max_score")))
UNISEG = ("paragraph*", "negative_paragraph*")
# Tagger → its tags, of those that need nothing but a text.
TAGGERS: dict[str, tuple[str, ...]] = {
    "bytes_length_v1": ("bytes",),
    "c4_v1": C4,
    "c4_v2": C4,
    "char_length_strip_ws_v1": ("length_no_ws",),
    "char_length_v1": ("length",),
    "char_length_with_paragraphs_v1": ("document", "paragraph*"),
    "gopher_v1": GOPHER,
    "gopher_v2": GOPHER,
    "not_alphanum_paragraph_v1": ("all_punct*",),
    "olmo_pretokenizer_v1": ("length",),
    "olmo_pretokenizer_with_paragraphs_v1": ("document", "paragraph*"),
    "paragraph_repetitions_v1": REPETITIONS,
    "pii_regex_v1": (*PII, "doc"),
    "pii_regex_v2": (*PII, "doc"),
    "pii_regex_with_counts_fast_v2": (*PII, "doc_count", "doc_frac"),
    "pii_regex_with_counts_v2": (*PII, "doc", "doc_count"),
    "repetitions_v1": REPETITIONS,
    "uniseg_length_paragraphs_v1": UNISEG,
    "uniseg_length_paragraphs_with_doc_length_v1": (*UNISEG, "document", "negative_document"),
    "uniseg_length_paragraphs_with_empty_v1": UNISEG,
    "uniseg_length_v1": ("length",),
    "whitespace_tokenizer_v1": ("length",),
    "whitespace_tokenizer_with_paragraphs_v1": ("document", "paragraph*"),
}
# Those that also need a file, which the toolkit would download: a fastText model (.bin) or a
# tokenizer.json.
MODEL_TAGGERS: dict[str, tuple[str, ...]] = {
    "dclm-oh-eli5": ("score",),
    "ft_lang_id_en_doc_v2": ("en", "not_en"),
    "ft_lang_id_en_only_v2": ("en",),
    "ft_lang_id_en_paragraph_v2": ("en*", "not_en*"),
    "ft_lang_id_en_paragraph_with_doc_score_v2": ("en*", "not_en*", "doc_en", "doc_not_en"),
    "paragraph_tokenizer_repetitions_v1": REPETITIONS,
    "tokenizer_repetitions_v1": REPETITIONS,
    "tokenizer_repetitions_v2r2": REPETITIONS,
}
# Why a tagger of the toolkit is not one of these: the first pattern that its name begins with.
UNSUPPORTED = {
    "cld|lingua|langdetect|pii_presidio|code_[^c]|code_copyright": "needs packages that are not in "
    "envs/dolma.txt",
    "ft_|jigsaw|dolma17|code_comp": "needs a model that the toolkit downloads, and has the tags "
    "of that model",
    "dolma_v|tokenizers_": "needs a tokenizer that the toolkit downloads",
    "domain|link|oisd|brave|blocklist|allowlist": "needs lists of sites that the toolkit downloads",
    "cc_re": "reads a page's HTML, which documents do not have",
    "random_number|doc_count": "says nothing of a text",
}

COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
CONDITION = re.compile(
    r"(?:(?P<aggregate>count|sum|min|max)\(\s*(?P<inner>\w+)\s*\)|(?P<tag>\w+))\s*"
    r"(?P<comparison>[<>]=?|[=!]=)\s*(?P<limit>-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)"
)


@dataclass(frozen=True)
class Measure:
    """A number for each document: a tag's first value, or an aggregate of its spans."""

    tag: str
    aggregate: str = ""

    def __str__(self) -> str:
        return f"{self.aggregate}({self.tag})" if self.aggregate else self.tag

    def of(self, spans: Spans) -> float | None:
        """The number; None where there is no span, unless they are counted or summed."""
        if self.aggregate == "count":
            return len(spans)
        values = [value for _, _, value in spans]
        if self.aggregate == "sum":
            return sum(values)
        if not values:
            return None
        return {"max": max, "min": min}[self.aggregate](values) if self.aggregate else values[0]


@dataclass(frozen=True)
class Condition:
    """What is kept: documents whose measure compares with a limit."""

    measure: Measure
    comparison: str
    limit: str  # a number, as it is written

    def __str__(self) -> str:
        return f"{self.measure} {self.comparison} {self.limit}"

    def holds(self, value: float | None) -> bool:
        """Whether a document is kept. Without a value it is, as by Dolma's own filters."""
        return value is None or COMPARISONS[self.comparison](value, float(self.limit))


@dataclass
class QualitySection(BaseConfig):
    """Tags training documents, and drops those for which a condition does not hold."""

    taggers: list[str]  # of `dolma tag`
    # "gopher_v1__gopher_v1__word_count >= 50": a tag's first value, or count(…), sum(…), min(…) or
    # max(…) over its spans. A document without the tag stays.
    keep: list[str] = field(default_factory=list)
    # Tagger → the file that it needs: a fastText model (.bin), or a tokenizer.json.
    models: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.taggers or len(set(self.taggers)) < len(self.taggers):
            raise ValueError(
                f"quality.taggers: expected names, each once, found {self.taggers}; known are "
                + ", ".join(TAGGERS)
            )
        for tagger in self.taggers:
            check_tagger(tagger, self.models)
        for tagger in self.models:
            if tagger not in MODEL_TAGGERS or tagger not in self.taggers:
                raise ValueError(
                    f"quality.models: expected one of quality.taggers that needs a file, found "
                    f"{tagger}; those that need one are {', '.join(MODEL_TAGGERS)}"
                )
        self.conditions  # noqa: B018 (raises)

    @property
    def conditions(self) -> list[Condition]:
        return parse_conditions(self.keep, self.taggers)


def check_tagger(tagger: str, models: dict[str, str]) -> None:
    """Raises ValueError for a tagger that is unknown, or cannot run here, with the reason."""
    if tagger in TAGGERS or (tagger in MODEL_TAGGERS and tagger in models):
        return
    if tagger in MODEL_TAGGERS:
        raise ValueError(
            f"quality.taggers: {tagger}: expected its model or tokenizer as a file, which the "
            f"toolkit would download, found none; add quality: {{models: {{{tagger}: FILE}}}}"
        )
    why = next((why for names, why in UNSUPPORTED.items() if re.match(names, tagger)), "is unknown")
    raise ValueError(
        f"quality.taggers: expected taggers that run here, found {tagger}, which {why}; known are "
        + ", ".join([*TAGGERS, *MODEL_TAGGERS])
    )


def list_measures(taggers: Sequence[str]) -> list[Measure]:
    """A measure for each tag of some taggers: its value, or the count of what was found."""
    return [
        Measure(f"{name}__{name}__{tag.rstrip('*')}", "count" * tag.endswith("*"))
        for tagger in taggers
        for name in [variable_name(tagger)]
        for tag in (TAGGERS | MODEL_TAGGERS)[tagger]
    ]


def variable_name(tagger: str) -> str:
    """A tagger's name as its tags and files have it."""
    return re.sub(r"\W", "_", tagger)


def parse_conditions(keep: Sequence[str], taggers: Sequence[str]) -> list[Condition]:
    """The conditions of a recipe. Raises ValueError for one that no tag or rule fits."""
    conditions = []
    tags = [measure.tag for measure in list_measures(taggers)]
    for text in keep:
        found = CONDITION.fullmatch(text.strip())
        if not found:
            raise ValueError(
                "quality.keep: expected a tag, a comparison and a number, as in 'count(TAG) <= 3' "
                f"(or TAG, sum, min, max; {', '.join(COMPARISONS)}), found {text!r}; correct it"
            )
        if (tag := found["tag"] or found["inner"]) not in tags:
            raise ValueError(
                f"quality.keep: expected a tag of quality.taggers, found {tag} in {text!r}; known "
                f"are {', '.join(tags)}"
            )
        measure = Measure(tag, found["aggregate"] or "")
        conditions.append(Condition(measure, found["comparison"], found["limit"]))
    return conditions


@stage(version=1, conditions=gz.conditions)
def quality(
    tags: Input, quality: Output, values: Output, taggers: tuple[str, ...], keep: tuple[str, ...]
) -> Facts:
    """Apply the conditions `keep` to the tags of a file's documents, of the stage `tags`.

    `quality` has the marks of each document, as `marks` has them: none if all conditions hold, else
    quality__dropped, [[0, 0, the number of the first that does not hold]]. `values` (parquet) has
    a row a document, in order: dropped (that number, or null), and each measure of the
    tags and conditions, null where a document has none.
    """
    import polars

    conditions = parse_conditions(keep, taggers)
    measures = list(dict.fromkeys([*list_measures(taggers), *(c.measure for c in conditions)]))
    rows: list[tuple[int | None, ...]] = []
    found: list[dict[str, Spans]] = []
    drops = [0] * len(conditions)
    for spans in read_marks(tags):
        known = {measure: measure.of(spans.get(measure.tag, [])) for measure in measures}
        failed = (n for n, one in enumerate(conditions) if not one.holds(known[one.measure]))
        first = next(failed, None)
        found.append({} if first is None else {QUALITY: [[0, 0, first]]})
        rows.append((first, *known.values()))  # type: ignore[arg-type]
        if first is not None:
            drops[first] += 1
    schema = {"dropped": polars.UInt16, **{str(measure): polars.Float64 for measure in measures}}
    polars.DataFrame(rows, schema, orient="row").write_parquet(values, **PARQUET)
    write_marks(quality, read_ids(tags), found)
    return {
        "documents": len(found),
        "drops": {str(c): n for c, n in zip(conditions, drops, strict=True) if n},
    }


def read_ids(tags: Path) -> list[str]:
    with gz.reading(tags) as lines:
        return [json.loads(line)["id"] for line in lines]
