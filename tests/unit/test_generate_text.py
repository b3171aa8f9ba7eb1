"""`olmo generate`: from a prompt to text, whatever kind of checkpoint it is, piece by piece."""

import gzip
import io
import json
from pathlib import Path

import pytest
import torch
from servers import web_server

from olmo.checkpoint.final import write_safetensors
from olmo.checkpoint.read import load_model
from olmo.config import TrainConfig
from olmo.corpus.tokenizer import trained_tokenizer
from olmo.inspect.generate import encode_prompt, find_checkpoint, generate_text, stream_text
from olmo.model import OLMo
from olmo.tokenizer import Tokenizer

MODEL = {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "vocab_size": 300,
    "embedding_size": 384,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "max_sequence_length": 64,
    "rope": True,
    "init_std": 0.3,
    "weight_tying": False,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project's folder whose run `small` has a final checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("generate")
    texts = [f"What is {i}? It is the number {i}, naïve café 日本語 🙂.\n" for i in range(200)]
    with gzip.open(folder / "documents.gz", "wt") as file:
        file.writelines(json.dumps({"id": text, "text": text}) + "\n" for text in texts)
    final = folder / "checkpoints/small/final"
    final.mkdir(parents=True)
    trained_tokenizer.build(
        documents=[folder / "documents.gz"], tokenizer=folder / "tokenizer.json", vocab_size=300
    )
    cfg = TrainConfig.new(model=MODEL, tokenizer={"identifier": str(folder / "tokenizer.json")})
    torch.manual_seed(0)
    model = OLMo(cfg.model)
    cfg.save(final / "config.yaml")
    write_safetensors(final, model.state_dict(), {})
    official = folder / "step5-unsharded"
    official.mkdir()
    cfg.save(official / "config.yaml")
    torch.save(model.state_dict(), official / "model.pt")
    return final


@pytest.fixture
def say(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """What the command writes to stdout."""
    monkeypatch.chdir(checkpoint.parents[2])
    monkeypatch.setenv("OLMO_STORE", str(checkpoint.parents[2] / "store"))

    def say(place: str = "small", prompt: str = "What is", **options) -> str:
        capsys.readouterr()
        generate_text(place, prompt, **{"tokens": 20} | options)
        return capsys.readouterr().out.removesuffix("\n")

    return say


def greedy(checkpoint: Path, ids: list[int], tokens: int) -> list[int]:
    """The likeliest ids, each by a pass over all that is there."""
    model, found = load_model(checkpoint), list(ids)
    for _ in range(tokens):
        with torch.no_grad():
            found.append(int(model(torch.tensor([found])).logits[0, -1].argmax()))
        if found[-1] == 0:
            return found[len(ids) : -1]
    return found[len(ids) :]


def test_greedy_text_is_that_of_full_passes(checkpoint: Path, say):
    words = Tokenizer.from_file(checkpoint.parents[2] / "tokenizer.json", eos_token_id=0)
    for prompt in ("What is 7?", "日本", "", "naïve "):
        ids = words.encode(prompt, add_special_tokens=False) or [0]
        expected = words.decode(greedy(checkpoint, ids, 20), skip_special_tokens=False)
        assert say(prompt=prompt) == expected and expected


def test_a_name_a_folder_a_url_an_official_one_say_the_same(checkpoint: Path, say):
    expected, root = say(), checkpoint.parents[2]
    assert say(str(checkpoint)) == expected
    assert say(str(root / "step5-unsharded")) == expected
    with web_server(root) as web:
        assert say(f"{web}/step5-unsharded") == expected


def test_a_seed_gives_the_same_text_again(say, capsys):
    assert say(temperature=1.0, seed=3) == say(temperature=1.0, seed=3)
    texts = {say(temperature=1.0, seed=seed) for seed in range(4)}
    assert len(texts) == 4
    assert say(temperature=1.0, top_k=1) == say()
    assert say(temperature=1.0, top_p=1e-9) == say()
    generate_text("small", "What", tokens=5, temperature=1.0)
    told = capsys.readouterr()
    seed = int(told.err.removeprefix("seed: "))
    again = say(prompt="What", tokens=5, temperature=1.0, seed=seed)
    assert again == told.out.removesuffix("\n"), "a seed that was not given is told"


def test_stdin_and_too_long_a_text(say, monkeypatch: pytest.MonkeyPatch, capsys):
    expected = say(prompt="What is 3?")
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 3?"))
    assert say(prompt="-") == expected
    generate_text("small", "What", tokens=70)
    assert "70 more exceed the 64 that the model was trained on" in capsys.readouterr().err
    generate_text("small", "What")
    assert "exceed" not in capsys.readouterr().err, "what is left of the context is the default"
    generate_text("small", "What " * 70)
    assert "more exceed the 64" in capsys.readouterr().err


def test_a_chat_s_prompt_is_a_conversation_up_to_the_answer(checkpoint: Path, say):
    from olmo.corpus.instructions import encode_conversations

    words = Tokenizer.from_file(checkpoint.parents[2] / "tokenizer.json", eos_token_id=0)
    talk = [("system", "Be brief."), ("user", " What is 1?\n"), ("assistant", "It is 1.")]
    for messages in (talk, talk[1:]):
        [(_, (ids, labels))] = list(encode_conversations([messages], words))
        system = "Be brief." if len(messages) == 3 else None
        assert encode_prompt(" What is 1?\n", words, True, system) == ids[: labels.index(True)]
    ids = encode_prompt("What is", words, chat=True)
    expected = words.decode(greedy(checkpoint, ids, 20), skip_special_tokens=False)
    assert say(chat=True) == expected != say()


def test_an_instruction_run_is_asked_as_one(checkpoint: Path, say, tmp_path: Path):
    cfg = TrainConfig.load(checkpoint / "config.yaml", validate_paths=False)
    data = cfg.data.update_with(paths=["x.npy"], label_mask_paths=["y.npy"])
    cfg.update_with(data=data).save(tmp_path / "config.yaml")
    (tmp_path / "model.safetensors").symlink_to(checkpoint / "model.safetensors")
    assert say(str(tmp_path)) == say(chat=True)
    assert say(str(tmp_path), chat=False) == say()


def test_pieces_are_whole_characters_and_make_the_text(checkpoint: Path):
    words = Tokenizer.from_file(checkpoint.parents[2] / "tokenizer.json", eos_token_id=0)
    text = "naïve 日本語 🙂 x🙂🙂"
    ids = words.encode(text, add_special_tokens=False)
    found = list(stream_text(iter(ids), words.decode))
    assert "".join(found) == text and not any("\ufffd" in piece for piece in found)
    assert 5 < len(found) < len(ids), "some characters take several ids"
    cut = words.encode("🙂", add_special_tokens=False)[:-1]
    assert "".join(stream_text(iter(cut), words.decode)) == words.decode(cut), (
        "what is broken is told"
    )


def test_what_cannot_be(checkpoint: Path, say, tmp_path: Path):
    for options, message in (
        ({"place": "nobody"}, r"found 'nobody' \(looked in nobody, checkpoints/nobody/final"),
        ({"top_k": 3}, "need sampling: give a --temperature"),
        ({"temperature": -1.0}, "expected temperature >= 0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k >= 1"),
        ({"temperature": 1.0, "top_p": 1.5}, "0 < top_p <= 1"),
        ({"temperature": 1.0, "top_p": 0.0}, "0 < top_p <= 1, found 1.0, None and 0.0"),
        ({"temperature": float("nan")}, "expected temperature >= 0, .* found nan"),
        ({"temperature": 1.0, "seed": 2**64}, "a --seed of 64 bits, found 18446744073709551616"),
        ({"tokens": 0}, "must be at least 1"),
        ({"system": "x"}, "--system is for chat"),
        ({"prompt": "a \udcff"}, "expected --prompt and --system in UTF-8, found .a .udcff"),
        ({"tokenizer": "missing/none.json"}, "is not available .*give --tokenizer FILE"),
    ):
        with pytest.raises(ValueError, match=message):
            say(**options)
    for name in ("tiny", "smalle"):
        (checkpoint.parents[1] / name / "run").mkdir(parents=True, exist_ok=True)
        (checkpoint.parents[1] / name / "run/config.yaml").touch()
    with pytest.raises(ValueError, match=r"; trained runs here: small, smalle, tiny$"):
        say("smal")
    Path("config").mkdir(exist_ok=True)
    Path("config/config.yaml").write_text("runs: {smal: {train: t.yaml}}")
    with pytest.raises(ValueError, match=r"; train it: uv run .* checkpoints/smal/final$"):
        say("smal")
    large = tmp_path / "large.json"
    with gzip.open(tmp_path / "d.gz", "wt") as file:
        file.writelines(json.dumps({"id": str(i), "text": f"w{i} " * 9}) + "\n" for i in range(999))
    trained_tokenizer.build(documents=[tmp_path / "d.gz"], tokenizer=large, vocab_size=400)
    with pytest.raises(ValueError, match="at most 384 tokens, as the model has, found 400"):
        say(tokenizer=str(large))
    assert find_checkpoint("small").endswith("small/final")
