"""`olmo chat`: messages from a terminal or from stdin, kept within the model's context."""

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from test_generate_text import checkpoint, greedy  # noqa: F401  # a fixture

from olmo.config import TrainConfig
from olmo.inspect.chat import chat, drop_oldest_messages
from olmo.inspect.generate import encode_chat
from olmo.tokenizer import Tokenizer

LENGTH = 160  # of the tuned run: room for a few messages


@pytest.fixture
def words(checkpoint: Path) -> Tokenizer:  # noqa: F811
    return Tokenizer.from_file(checkpoint.parents[2] / "tokenizer.json", eos_token_id=0)


@pytest.fixture
def project(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """A project with the run `small`, and with `tuned`, the same tuned on conversations."""
    root = checkpoint.parents[2]
    monkeypatch.chdir(root)
    monkeypatch.setenv("OLMO_STORE", str(root / "store"))
    tuned = root / "checkpoints/tuned/final"
    if not tuned.exists():
        tuned.mkdir(parents=True)
        cfg = TrainConfig.load(checkpoint / "config.yaml", validate_paths=False)
        data = cfg.data.update_with(paths=["x.npy"], label_mask_paths=["y.npy"])
        model = cfg.model.update_with(max_sequence_length=LENGTH)
        cfg.update_with(data=data, model=model).save(tuned / "config.yaml")
        (tuned / "model.safetensors").symlink_to(checkpoint / "model.safetensors")
    return root


@pytest.fixture
def say(project: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """The answers to lines of stdin, and what was said beside them."""

    def say(run: str, lines: str, **options) -> tuple[list[str], str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        capsys.readouterr()
        chat(run, **{"temperature": 0.0, "tokens": 8} | options)
        out, err = capsys.readouterr()
        return out.split("\n")[:-1], err

    return say


def text_after(checkpoint: Path, ids: list[int], words: Tokenizer) -> str:  # noqa: F811
    return words.decode(greedy(checkpoint, ids, 8), skip_special_tokens=False)


def test_a_tuned_run_answers_with_what_was_said_before(checkpoint, project, say, words):  # noqa: F811
    talk = [("system", "Be brief."), ("user", "What is 7?")]
    first = text_after(checkpoint, encode_chat(talk, words), words)
    talk += [("assistant", first), ("user", "And 8?")]
    second = text_after(checkpoint, encode_chat(talk, words), words)
    answers, told = say("tuned", "What is 7?\n\nAnd 8?", system="Be brief.")
    assert "\n".join(answers) == f"{first}\n{second}"
    assert told == "tuned answers, as it was tuned on conversations; Ctrl-D ends\n"


def test_any_other_continues_the_text(checkpoint, project, say, words):  # noqa: F811
    ids = words.encode("What is", add_special_tokens=False)
    first = text_after(checkpoint, ids, words)
    more = words.encode(f"What is{first}\nIt is", add_special_tokens=False)
    answers, told = say("small", "What is\nIt is\n")
    assert "\n".join(answers) == f"{first}\n{text_after(checkpoint, more, words)}"
    assert "small continues the text, as it was not tuned" in told


def test_the_conversation_stays_within_the_context(project, say, words):
    talk = [("system", "Be brief.")]
    for number in range(9):
        talk += [("user", f"What is {number}?"), ("assistant", f"It is {number}.")]
    talk.append(("user", "And?"))
    kept, ids = drop_oldest_messages(talk, words, LENGTH - 8, is_tuned=True)
    assert ids == encode_chat(kept, words) and len(ids) <= LENGTH - 8
    assert kept[0] == talk[0] and kept[1:] == talk[-len(kept) + 1 :] and 2 < len(kept) < len(talk)
    assert kept[1][0] == "user"
    answers, _ = say("tuned", "What is 7?\n" * 12)
    assert len(answers) >= 12
    answers, told = say("tuned", f"{'What is 7? ' * 30}\nWhat is 7?\n")
    assert f"expected a message of fewer than {LENGTH} tokens, the model's context, found" in told
    assert answers == say("tuned", "What is 7?")[0], "what is too long is not part of it"


def test_a_seed_gives_the_same_answers(say):
    one, two, other = (say("tuned", "a\nb", temperature=1.0, seed=s)[0] for s in (1, 1, 2))
    assert one == two != other


def test_what_cannot_be(say):
    with pytest.raises(ValueError, match="found 'nobody'"):
        say("nobody", "")
    with pytest.raises(ValueError, match="--system is for a run that was tuned on conversations"):
        say("small", "", system="Be brief.")
    with pytest.raises(ValueError, match=r"expected a message in UTF-8, found .a .udcff"):
        say("small", "a \udcff")


@pytest.mark.slow
def test_a_terminal_has_a_prompt_and_ctrl_d_ends(project: Path):
    """The terminal is one of its own; Ctrl-D is a key in it."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "olmo.cli", "chat", "tuned", "--tokens", "3"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    for end, typed in ((b"> ", b"What is 7?\n"), (b"\n> ", b"\x04")):
        while not seen.endswith(end):
            seen += os.read(ours, 1024)
        os.write(ours, typed)
    assert process.wait(60) == 0
    os.close(ours)


def test_ctrl_c_ends_without_an_error(say, monkeypatch: pytest.MonkeyPatch):
    def interrupt(_: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    assert say("tuned", "")[0] == [""]
