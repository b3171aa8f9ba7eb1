"""The engine `fast` gives the toolkit's bytes, or sends a document to the toolkit, or refuses."""

import gzip
import json
import random
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre

from olmo.corpus import encoding, fast
from olmo.corpus.documents import DocumentsSection, documents
from olmo.corpus.encoding import (
    ENCODERS,
    GIGATOKEN,
    GPT4_PATTERN,
    MAX_SPACE_RUN,
    TIKTOKEN,
    find_byte_level_problem,
    is_stable,
    make_encoder,
)
from olmo.corpus.fast import Fast
from olmo.corpus.tokenizer import to_portable, trained_tokenizer
from olmo.corpus.tokens import TokensSection, choose_engine, tokens

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
SCRAPS += ["'ſ", "ſ", "\u2000", "\xa0", "\u212a", "\u037e", "\u0338", "\u200d", "\U0001f468"]


def texts(seed, count=400):
    """Pieces of everything, in random order."""
    chance = random.Random(seed)
    everything = [*SCRAPS, *PROSE, *"".join(PROSE)]
    everything += [" " * n for n in range(1, 60)] + ["\n" * n for n in range(1, 9)]
    for _ in range(count):
        yield "." + "".join(chance.choices(everything, k=chance.randrange(1, 40)))


def other_tokenizers():
    """Tokenizers to be trained: GPT-4's splitting, Llama's letters, BERT's words, T5's unigrams."""
    gpt4 = Tokenizer(models.BPE())
    by_bytes = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt4.pre_tokenizer = pre.Sequence([pre.Split(Regex(GPT4_PATTERN), "isolated"), by_bytes])
    yield (
        "gpt4",
        gpt4,
        trainers.BpeTrainer(
            vocab_size=800, initial_alphabet=pre.ByteLevel.alphabet(), special_tokens=NAMES[:2]
        ),
    )
    llama = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    llama.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    llama.decoder = decoders.ByteFallback()
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    yield (
        "llama",
        llama,
        trainers.BpeTrainer(
            vocab_size=900, special_tokens=[*NAMES[:2], "<unk>", *fallback], max_token_length=8
        ),
    )
    bert = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    bert.normalizer = normalizers.BertNormalizer()
    bert.pre_tokenizer = pre.BertPreTokenizer()
    yield (
        "bert",
        bert,
        trainers.WordPieceTrainer(vocab_size=600, special_tokens=[*NAMES[:2], "[UNK]"]),
    )
    unigram = Tokenizer(models.Unigram())
    unigram.normalizer = normalizers.NFKC()
    unigram.pre_tokenizer = pre.Metaspace()
    yield (
        "unigram",
        unigram,
        trainers.UnigramTrainer(
            vocab_size=400, special_tokens=[*NAMES[:2], "<unk>"], unk_token="<unk>"
        ),
    )


BYTE_LEVEL, OTHERS = ["plain", "olmo", "raw", "gpt4"], ["llama", "bert", "unigram"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """As we train them, as OLMo's with its added tokens, not normalising; and of other kinds."""
    folder = tmp_path_factory.mktemp("tokenizers")
    lines = [json.dumps({"id": "a", "text": text}) for text in [*PROSE * 3, *texts(1, 100)]]
    (folder / "documents.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    plain, olmo, raw = (folder / name for name in ("plain.json", "olmo.json", "raw.json"))
    trained_tokenizer.build(documents=[folder / "documents.gz"], tokenizer=plain, vocab_size=800)
    model = Tokenizer.from_file(str(plain))
    model.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    model.add_tokens([AddedToken(name, normalized=True) for name in NAMES[2:]])
    olmo.write_text(to_portable(model.to_str()))
    model.normalizer = None
    model.add_tokens([AddedToken("a b", normalized=False)])  # spaces cannot join the pattern
    raw.write_text(to_portable(model.to_str().replace('"normalizer":{"type":"NFC"}', "")))
    found = {"plain": plain, "olmo": olmo, "raw": raw}
    for name, model, trainer in other_tokenizers():
        model.train_from_iterator([*PROSE * 3, *texts(1, 100)], trainer)
        found[name] = folder / f"{name}.json"
        made = json.loads(to_portable(model.to_str()))  # Llama's bytes are tokens like others
        made["added_tokens"] = [t for t in made["added_tokens"] if t["content"][:3] != "<0x"]
        found[name].write_text(json.dumps(made))
    return found


def both(folder, written, tokenizer, dolma, **parameters):
    """Tokenize documents by the toolkit, and by `fast` with each encoder; asserts equal bytes; what
    `fast` returned."""
    lines = [json.dumps({"id": f"doc-{n}", "text": text}) for n, text in enumerate(written)]
    (folder / "source.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    made = {kind: folder / f"{kind}.out" for kind in ("documents", "heldout", "table")}
    documents.build(
        source=folder / "source.gz",
        name="source.gz",
        **made,
        config=DocumentsSection(allow=["empty-text"]),
    )
    engines = [dolma, *(Fast(dolma, audit_share=0, encoder=encoder) for encoder in ENCODERS)]
    for engine in engines:
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
    theirs, *ours = (folder / engine.toolkit for engine in engines)
    for path in ours:
        a, b = (np.fromfile(place / "tokens", facts["dtype"]) for place in (theirs, path))
        assert a.tolist() == b.tolist(), path.name
        assert (theirs / "index").read_bytes() == (path / "index").read_bytes()
    return facts


@pytest.mark.parametrize("special_tokens", ["as-special", "as-text"])
@pytest.mark.parametrize("name", BYTE_LEVEL + OTHERS)
def test_the_engines_agree_on_text_of_all_kinds(tmp_path, tokenizers, dolma, name, special_tokens):
    written = [*PROSE, *texts(2), "x" * 20_000, "=-" * 9_000, "\n" * 9_000 + "."]
    facts = both(tmp_path, written, tokenizers[name], dolma, special_tokens=special_tokens)
    if name != "unigram":  # whose pieces are the names themselves, special or not
        assert (NAMES[0] in facts["special_tokens_in_text"]) == (special_tokens == "as-special")
    content = tokenizers[name].read_text()
    for encoder in ENCODERS:
        encode = make_encoder(content.encode(), special_tokens == "as-text", encoder)
        assert all(encode(text) is not None for text in written), "none was left to the toolkit"
        is_array = isinstance(encode("plain"), np.ndarray)
        assert is_array == (encoder == GIGATOKEN and name in BYTE_LEVEL)
    assert (find_byte_level_problem(json.loads(content), content) is None) == (name in BYTE_LEVEL)


def test_characters_on_which_unicode_versions_differ_go_to_the_toolkit(tmp_path, tokenizers, dolma):
    young = ["\u1c89", "\U0001e030", "\u08cf", "\U00011f02", "\U0001faef", "\U000323af", "\u0378"]
    written = ["plain", *(f"a\u0345{c}\u0327b 1{c}1 {c} {c}" for c in young), "the last 👍"]
    both(tmp_path, written, tokenizers["olmo"], dolma)
    encode = make_encoder(tokenizers["olmo"].read_bytes(), False)
    assert [encode(text) is None for text in written] == [False, *[True] * len(young), False]


@pytest.fixture(scope="module")
def stable():
    """Texts of every stable character below U+3000, and of each 29th above, in company."""
    letters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    stable = [c for c in letters if is_stable(c)]
    assert len(stable) > 200_000
    sample = stable[:0x3000] + stable[0x3000::29]

    def in_context(c):
        apart = unicodedata.normalize("NFD", c)
        return f"a\u0345{c}\u0327{apart}\u0338x{apart}\u0301 {c}9{c}.{c} {c}\u1161{c}\u3099{apart}"

    return ["\n".join(map(in_context, sample[n : n + 50])) for n in range(0, len(sample), 50)]


@pytest.mark.parametrize("name", ["plain", "gpt4", "unigram"])
@pytest.mark.slow
def test_stable_characters_are_split_and_composed_as_by_the_toolkit(
    tmp_path, tokenizers, dolma, stable, name
):
    both(tmp_path, stable, tokenizers[name], dolma)


def random_texts(stable, count):
    """Code points of all planes, half of the texts of stable ones alone."""
    chance = random.Random(5)
    every = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    letters = [c for text in stable for c in text]
    for n in range(count):
        some = chance.choices(letters if n % 2 else every, k=chance.randrange(1, 30))
        some += chance.choices(SCRAPS, k=chance.randrange(3))
        chance.shuffle(some)
        yield "".join(some)


@pytest.mark.parametrize("name", ["olmo", "gpt4"])
@pytest.mark.parametrize("count", [2_000, pytest.param(200_000, marks=pytest.mark.long)])
def test_random_text_of_all_planes(tmp_path, tokenizers, dolma, stable, name, count):
    written = list(random_texts(stable, count))
    encode = make_encoder(tokenizers[name].read_bytes(), False)
    left = sum(encode(text) is None for text in written)
    assert count // 4 < left < count // 2, "both kinds"
    both(tmp_path, written, tokenizers[name], dolma)


@pytest.mark.slow
def test_memory_is_bounded_however_many_words_a_text_has(tokenizers, monkeypatch):
    def resident_mb():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz  ", np.uint8)
    texts = [
        np.random.default_rng(n).choice(letters, 1_000_000).tobytes().decode() for n in range(40)
    ]
    content = tokenizers["plain"].read_bytes()
    monkeypatch.setattr(encoding, "MAX_REMEMBERED_BYTES", 3_000_000)
    encode = make_encoder(content, False)
    encode(texts[0])
    before = resident_mb()
    found = [len(encode(text)) for text in texts]
    assert resident_mb() - before < 120  # 280 without a limit
    assert found == [len(make_encoder(content, False, TIKTOKEN)(text)) for text in texts]


@pytest.mark.slow
def test_a_run_of_spaces_that_overflows_tiktoken_goes_to_the_toolkit(tmp_path, tokenizers, dolma):
    half = MAX_SPACE_RUN // 2
    long = [
        "a" * shift + "\u3000" + " " * (MAX_SPACE_RUN - 1) + "b" for shift in (1, half - 1, half)
    ]
    short = ["a" + " " * (MAX_SPACE_RUN - 1) + "b" + " " * half + "c", "a" * MAX_SPACE_RUN + "b"]
    written = [*long, "a" + " \n" * MAX_SPACE_RUN + "b", *short]
    encode = make_encoder(tokenizers["plain"].read_bytes(), False)
    assert [encode(text) is None for text in written] == [True] * 4 + [False] * 2
    both(tmp_path, written, tokenizers["plain"], dolma)


@pytest.mark.parametrize(
    ("chosen", "beginning"),
    [
        ({}, "dolma=="),
        ({"engine": "fast"}, "fast==2 gigatoken=="),
        ({"engine": "fast", "encoder": "tiktoken"}, "fast==2 tiktoken=="),
        ({"engine": "fast", "encoder": "tokenizers"}, "fast==2 tokenizers=="),
    ],
)
def test_the_recipe_chooses_the_encoder_and_a_key_has_its_version(dolma, chosen, beginning):
    engine = choose_engine(TokensSection(**chosen), dolma)
    assert engine.toolkit.startswith(beginning)
    with pytest.raises(ValueError, match=r"tokens\.encoder: expected .*, found 'other'"):
        TokensSection(encoder="other")


def test_an_audit_finds_a_wrong_token(tmp_path, tokenizers, dolma, monkeypatch):
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
    words = encoding.gigatoken_words

    def wrong(*given):
        encode = words(*given)
        return lambda text: encode(text) ^ (text == "text 7")  # one bit of each id

    monkeypatch.setattr(encoding, "gigatoken_words", wrong)
    monkeypatch.setattr(fast, "make_encoder", make_encoder.__wrapped__)
    tokenize(share=0)
    with pytest.raises(ValueError, match="failed its audit: document 'doc-7'"):
        tokenize(share=1)


def swap_two_merges(tokenizer):
    merges = tokenizer["model"]["merges"]
    merges[10], merges[500] = merges[500], merges[10]


def add_a_token_without_a_merge(tokenizer):
    tokenizer["model"]["vocab"]["ĠunreachableĠ"] = len(tokenizer["model"]["vocab"])


def add_an_unreachable_merge(tokenizer):
    """`abc` of a and bc, where ab merges first: only tiktoken would find abc."""
    vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    for left, right in ("ÿ", "þ"), ("þ", "ý"), ("ÿ", "þý"):
        vocab[left + right] = max(vocab.values()) + 1
        merges.append(f"{left} {right}")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.update(normalizer={"type": "NFKC"}), "its normalizer is"),
        (lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "its pre-tokenizer is"),
        (lambda t: t["pre_tokenizer"].update(add_prefix_space=True), "its pre-tokenizer is"),
        (
            lambda t: t["added_tokens"][0].update(lstrip=True),
            "also matches characters around it",
        ),
        (swap_two_merges, "do not follow the order of its merges|is not there"),
        (add_a_token_without_a_merge, "not the bytes and the results"),
        (add_an_unreachable_merge, "its token ÿþý is not what its own"),
    ],
)
def test_tiktoken_is_not_used_for_a_tokenizer_that_it_cannot_reproduce(
    tmp_path, tokenizers, dolma, change, reason
):
    tokenizer = json.loads(tokenizers["plain"].read_text())
    change(tokenizer)
    content = json.dumps(tokenizer)
    assert re.search(reason, str(find_byte_level_problem(tokenizer, content)))
    (tmp_path / "tokenizer.json").write_text(content)
    both(tmp_path, [*PROSE, *texts(3, 100), "ÿþý"], tmp_path / "tokenizer.json", dolma)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t["model"].update(dropout=0.1), "its model has dropout"),
        (lambda t: t.update(truncation={"max_length": 8}), "it truncates or pads"),
    ],
)
def test_a_tokenizer_that_cannot_be_reproduced_is_refused(tokenizers, change, reason):
    tokenizer = json.loads(tokenizers["plain"].read_text())
    change(tokenizer)
    with pytest.raises(ValueError, match=f"cannot reproduce this tokenizer: .*({reason})"):
        make_encoder(json.dumps(tokenizer).encode(), False)
