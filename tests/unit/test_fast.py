"""The engine `fast` gives the toolkit's bytes, or sends a document to the toolkit, or refuses."""

import gzip
import json
import random
import unicodedata

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from olmo.data import fast
from olmo.data.documents import documents
from olmo.data.fast import LONG_SPACE, Fast, encoder, is_settled
from olmo.data.tokenizer import portable, trained_tokenizer
from olmo.data.tokens import tokens

PROSE = [
    "The quick brown fox doesn't jump; it'll sleep, we're told. I'm 99.9% sure they've 1,234.",
    "Größenordnungsmäßig: Straße, naïve café, Ærøskøbing, İstanbul, Ελληνικά, Русский язык.",
    "漢字かな交じり文。한국어 텍스트. ภาษาไทย עברית العربية हिन्दी ქართული አማርኛ ᏣᎳᎩ.",
    "def f(x):\n    if x  >  0:\n\t\treturn x ** 2   # done\r\n\n\n        else:\n  pass\n",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 🇩🇪 e\u0301 ﬁ ﷺ Å ½ ² ① ǅ 〇 𝔘𝔫𝔦 𐍈",
    "\x00\x01\x1b[0m\x7f\x85\xa0\u200b\u2028\u2029\u3000\ufeff\ufffd\U0010fffd\ue000",
]
NAMES = ["<|endoftext|>", "<|padding|>", "|||IP_ADDRESS|||", "|||EMAIL_ADDRESS|||"]
SCRAPS = [*NAMES, "<|end", "|||IP", "|||", " ", "  ", "   ", "\n", "\t", "'s", "'LL", "\u0301", "İ"]


def texts(seed, count=400):
    """Pieces of everything, in random order."""
    chance = random.Random(seed)
    everything = [*SCRAPS, *PROSE, *"".join(PROSE)]
    everything += [" " * n for n in range(1, 60)] + ["\n" * n for n in range(1, 9)]
    for _ in range(count):
        yield "." + "".join(chance.choices(everything, k=chance.randrange(1, 40)))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Three that qualify: as we train them, as OLMo's with its added tokens, not normalising."""
    folder = tmp_path_factory.mktemp("tokenizers")
    lines = [json.dumps({"id": "a", "text": text}) for text in [*PROSE * 3, *texts(1, 100)]]
    (folder / "documents.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    plain, olmo, raw = (folder / name for name in ("plain.json", "olmo.json", "raw.json"))
    trained_tokenizer.build(documents=[folder / "documents.gz"], tokenizer=plain, vocab_size=800)
    model = Tokenizer.from_file(str(plain))
    model.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    model.add_tokens([AddedToken(name, normalized=True) for name in NAMES[2:]])
    olmo.write_text(portable(model.to_str()))
    model.normalizer = None
    model.add_tokens([AddedToken("a b", normalized=False)])  # spaces cannot join the pattern
    raw.write_text(portable(model.to_str().replace('"normalizer":{"type":"NFC"}', "")))
    return {"plain": plain, "olmo": olmo, "raw": raw}


def both(folder, written, tokenizer, dolma, **parameters):
    """Tokenize documents by both engines; asserts equal bytes; what `fast` returned."""
    lines = [json.dumps({"id": f"doc-{n}", "text": text}) for n, text in enumerate(written)]
    (folder / "source.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    made = {kind: folder / f"{kind}.out" for kind in ("documents", "heldout", "table")}
    documents.build(source=folder / "source.gz", name="source.gz", **made, allow=("empty-text",))
    for engine in dolma, Fast(dolma, audit_share=0):
        (folder / engine.toolkit).mkdir()
        facts = tokens.build(
            documents=made["documents"],
            table=made["table"],
            tokenizer=tokenizer,
            tokens=folder / engine.toolkit / "tokens",
            index=folder / engine.toolkit / "index",
            eos_token_id=0,
            pad_token_id=1,
            toolkit=engine.toolkit,
            engine=engine,
            **parameters,
        )
    a, b = (folder / engine.toolkit for engine in (dolma, engine))
    mine, theirs = (np.fromfile(path / "tokens", facts["dtype"]) for path in (a, b))
    assert mine.tolist() == theirs.tolist()
    assert (a / "index").read_bytes() == (b / "index").read_bytes()
    return facts


@pytest.mark.parametrize("special_tokens", ["as-special", "as-text"])
@pytest.mark.parametrize("name", ["plain", "olmo", "raw"])
def test_the_engines_agree_on_text_of_all_kinds(tmp_path, tokenizers, dolma, name, special_tokens):
    written = [*PROSE, *texts(2), "x" * 20_000, "=-" * 9_000, "\n" * 9_000 + "."]
    facts = both(tmp_path, written, tokenizers[name], dolma, special_tokens=special_tokens)
    assert bool(facts["special_tokens_in_text"]) == (special_tokens == "as-special")
    encode = encoder(tokenizers[name].read_bytes(), special_tokens == "as-text")
    assert all(encode(text) is not None for text in written), "none was left to the toolkit"


def test_characters_on_which_editions_of_unicode_differ_go_to_the_toolkit(
    tmp_path, tokenizers, dolma
):
    young = ["\u1c89", "\U0001e030", "\u08cf", "\U00011f02", "\U0001faef", "\U000323af", "\u0378"]
    written = ["plain", *(f"a\u0345{c}\u0327b 1{c}1 {c} {c}" for c in young), "the last 👍"]
    both(tmp_path, written, tokenizers["olmo"], dolma)
    encode = encoder(tokenizers["olmo"].read_bytes(), False)
    assert [encode(text) is None for text in written] == [False, *[True] * len(young), False]


def test_every_settled_character_is_split_and_composed_as_the_toolkit_does(
    tmp_path, tokenizers, dolma
):
    letters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    settled = [c for c in letters if is_settled(c)]
    assert len(settled) > 200_000
    sample = settled[:0x3000] + settled[0x3000::29]

    def around(c):
        apart = unicodedata.normalize("NFD", c)
        return f"a\u0345{c}\u0327{apart}\u0338x{apart}\u0301 {c}9{c}.{c} {c}\u1161{c}\u3099{apart}"

    written = ["\n".join(map(around, sample[n : n + 50])) for n in range(0, len(sample), 50)]
    both(tmp_path, written, tokenizers["plain"], dolma)


def test_a_run_of_space_that_breaks_the_library_goes_to_the_toolkit(tmp_path, tokenizers, dolma):
    written = ["a" + " " * (LONG_SPACE + 1) + "b", "a" + " \n" * LONG_SPACE + "b", "c"]
    encode = encoder(tokenizers["plain"].read_bytes(), False)
    assert [encode(text) is None for text in written] == [True, True, False]
    both(tmp_path, written, tokenizers["plain"], dolma)


def test_an_audit_finds_a_token_that_is_wrong(tmp_path, tokenizers, dolma, monkeypatch):
    encode = encoder(tokenizers["plain"].read_bytes(), False)
    assert Fast(dolma, 0).toolkit.startswith("fast==1 tiktoken==")

    def tokenize(share):
        lines = [json.dumps({"id": f"doc-{n}", "text": f"text {n}"}) for n in range(9)]
        (tmp_path / "source.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
        made = {kind: tmp_path / f"{kind}.out" for kind in ("documents", "heldout", "table")}
        documents.build(source=tmp_path / "source.gz", name="source.gz", **made)
        engine = Fast(dolma, audit_share=share)
        tokens.build(
            documents=made["documents"],
            table=made["table"],
            tokenizer=tokenizers["plain"],
            tokens=tmp_path / "tokens",
            index=tmp_path / "index",
            eos_token_id=0,
            pad_token_id=1,
            toolkit=engine.toolkit,
            engine=engine,
        )

    tokenize(share=1)
    monkeypatch.setattr(
        fast, "encoder", lambda *_: lambda t: [5, 6] if t == "text 7" else encode(t)
    )
    tokenize(share=0)
    with pytest.raises(ValueError, match="failed its audit: document 'doc-7'"):
        tokenize(share=1)


def swap_two_merges(tokenizer):
    merges = tokenizer["model"]["merges"]
    merges[10], merges[500] = merges[500], merges[10]


def add_a_token_out_of_nothing(tokenizer):
    tokenizer["model"]["vocab"]["ĠunreachableĠ"] = len(tokenizer["model"]["vocab"])


def merge_by_a_way_that_is_never_taken(tokenizer):
    """`abc` of a and bc, where ab merges first: only tiktoken would find abc."""
    vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    for left, right in ("ÿ", "þ"), ("þ", "ý"), ("ÿ", "þý"):
        vocab[left + right] = max(vocab.values()) + 1
        merges.append(f"{left} {right}")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t["model"].update(dropout=0.1), "its model has dropout"),
        (lambda t: t["model"].update(ignore_merges=True), "its model has ignore_merges"),
        (lambda t: t.update(normalizer={"type": "NFKC"}), "its normalizer is"),
        (lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "its pre-tokenizer is"),
        (lambda t: t["pre_tokenizer"].update(add_prefix_space=True), "its pre-tokenizer is"),
        (lambda t: t["added_tokens"][0].update(lstrip=True), "takes in its surroundings"),
        (swap_two_merges, "do not follow the order of its merges|is not there"),
        (add_a_token_out_of_nothing, "not the bytes and what its merges make"),
        (merge_by_a_way_that_is_never_taken, "its token ÿþý does not come out"),
    ],
)
def test_a_tokenizer_that_cannot_be_reproduced_is_refused(tokenizers, change, reason):
    tokenizer = json.loads(tokenizers["plain"].read_text())
    change(tokenizer)
    with pytest.raises(ValueError, match=f"cannot reproduce this tokenizer: .*({reason})"):
        encoder(json.dumps(tokenizer).encode(), False)
