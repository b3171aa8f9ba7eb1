"""An export computes in transformers what its checkpoint computes here, and comes back."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import web_server

from olmo.checkpoint import huggingface, load_model
from olmo.checkpoint.final import write_safetensors
from olmo.config import ModelConfig, TrainConfig, to_yaml
from olmo.corpus.conversations import download_conversations, local_conversations
from olmo.corpus.formats import converted
from olmo.corpus.questions import stdlib_questions
from olmo.corpus.sources import fetched
from olmo.io import sealed
from olmo.model import OLMo
from olmo.pipeline.convert import convert
from olmo.pipeline.start import fetched_checkpoint, local_checkpoint
from olmo.report.card import card
from olmo.store.action import Action
from olmo.store.record import output_files
from olmo.store.store import Store

OLMO1: dict[str, Any] = {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "rope": True,
    "include_bias": False,
    "layer_norm_with_affine": False,
    "vocab_size": 300,
    "embedding_size": 384,
    "max_sequence_length": 128,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "init_std": 0.2,
}
OLMO2 = OLMO1 | {
    "norm_after": True,
    "attention_layer_norm": True,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "block_type": "llama",
}
EXPRESSED: dict[str, dict[str, Any]] = {
    "olmo": OLMO1,
    "olmo, clipped": OLMO1 | {"clip_qkv": 0.5, "weight_tying": False},
    "olmo, grouped queries": OLMO1 | {"n_kv_heads": 2, "rope_theta": 500_000},
    "olmo, one head of keys": OLMO1 | {"multi_query_attention": True, "block_type": "llama"},
    "olmo, blocks in groups": OLMO1 | {"block_group_size": 2, "embedding_size": None},
    "olmo, width given": OLMO1 | {"mlp_hidden_size": 88, "layer_norm_type": "low_precision"},
    "olmo2": OLMO2,
    "olmo2, grouped queries": OLMO2 | {"n_kv_heads": 2, "weight_tying": False},
    "olmo2, fused": OLMO2 | {"block_type": "sequential", "layer_norm_eps": 1e-6},
}
REFUSED: dict[str, dict[str, Any]] = {
    "alibi": OLMO1 | {"alibi": True, "rope": False},
    "rope": OLMO1 | {"rope": False},
    "include_bias": OLMO1 | {"include_bias": True},
    "activation_type": OLMO1 | {"activation_type": "gelu"},
    "layer_norm_with_affine": OLMO1 | {"layer_norm_with_affine": True},
    "layer_norm_type": OLMO1 | {"layer_norm_type": "rms"},
    "layer_norm_eps": OLMO1 | {"layer_norm_eps": 1e-6},
    "embedding_layer_norm": OLMO1 | {"embedding_layer_norm": True},
    "scale_logits": OLMO1 | {"scale_logits": True},
    "norm_after": OLMO1 | {"norm_after": True},
    "attention_layer_norm": OLMO2 | {"attention_layer_norm": False},
    "bias_for_layer_norm": OLMO2 | {"bias_for_layer_norm": True},
    "clip_qkv": OLMO2 | {"clip_qkv": 1.0},
}


def checkpoint(folder: Path, settings: dict[str, Any]) -> OLMo:
    """A final folder with random weights; norms' weights too, which would otherwise all be one."""
    torch.manual_seed(0)
    cfg = TrainConfig.new(model=settings)
    model = OLMo(cfg.model).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_f" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    folder.mkdir()
    write_safetensors(folder, model.state_dict())
    (folder / "config.yaml").write_text(to_yaml({"model": cfg.model.asdict()}))
    return model


@pytest.mark.parametrize("name", EXPRESSED)
def test_logits_are_ours(name: str, tmp_path: Path, tokenizer: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours = checkpoint(tmp_path / "final", EXPRESSED[name])
    convert(tmp_path / "final", tmp_path / "hf", kind="hf", tokenizer=tokenizer)
    theirs, told = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert type(theirs).__name__ == huggingface.ARCHITECTURES[name.split(",")[0]]
    ids = torch.randint(2, 300, (2, 100))
    with torch.no_grad():
        expected, found = ours(ids).logits, theirs(ids).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", EXPRESSED)
def test_there_and_back_is_bit_equal(name: str, tmp_path: Path, tokenizer: Path) -> None:
    checkpoint(tmp_path / "final", EXPRESSED[name])
    convert(tmp_path / "final", tmp_path / "hf", kind="hf", tokenizer=tokenizer)
    convert(tmp_path / "hf", tmp_path / "back", kind="safetensors")
    for file in ("model.safetensors", "config.yaml"):
        assert (tmp_path / "final" / file).read_bytes() == (tmp_path / "back" / file).read_bytes()


@pytest.mark.parametrize("kind", ["hf", "safetensors", "unsharded"])
def test_what_the_pipeline_made_is_not_written_over(
    kind: str, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write goes through a link, and root may write to an object of the store too."""
    monkeypatch.setenv("OLMO_STORE", str(tmp_path / "store"))
    checkpoint(tmp_path / "given", OLMO1)
    files = sorted((tmp_path / "given").iterdir())
    final = tmp_path / "final"
    local_checkpoint(files=files, checkpoint=final, folder=tmp_path / "given", optimizer=False)
    objects = sorted(path for path in (tmp_path / "store/objects").rglob("*") if path.is_file())
    before = [path.read_bytes() for path in objects]
    (tmp_path / "run").symlink_to(tmp_path / "store/work")
    for into in (final, tmp_path / "run"):
        with pytest.raises(ValueError, match=r"a place of your own .* found .*(final|run), which"):
            convert(tmp_path / "given", into, kind=kind, tokenizer=tokenizer)
    assert [path.read_bytes() for path in objects] == before


def test_the_tokenizer_is_the_one_that_the_store_knows(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for `olmo generate`: a checkpoint of the pipeline names none in its config."""
    monkeypatch.setenv("OLMO_STORE", str(tmp_path / "store"))
    store = Store(tmp_path / "store")
    copied = Path(shutil.copy(tokenizer, tmp_path))
    inputs = {"tokenizer": store.put(copied)["sha256"]}

    def build(work: Path) -> dict[str, Any]:
        (work / "outputs/tokens").write_text("ids")
        return {}

    record = store.run(Action("tokens", 1, {}, inputs), build)
    tokens = record["outputs"]["tokens"]["sha256"]
    final = tmp_path / "final"
    checkpoint(final, OLMO1)
    with (final / "config.yaml").open("a") as config:
        config.write(f"data: {{paths: [objects/{tokens}]}}\n")
    convert(final, tmp_path / "hf", kind="hf")
    found, known = (json.loads(p.read_text()) for p in (tmp_path / "hf/tokenizer.json", tokenizer))
    assert found["model"]["vocab"] == known["model"]["vocab"]
    store.record_path(record["key"]).unlink()
    with pytest.raises(ValueError, match=r"is not available .*give --tokenizer FILE"):
        convert(final, tmp_path / "none", kind="hf")


def test_weights_are_for_whom_the_umask_says(tmp_path: Path, tokenizer: Path) -> None:
    """As every other file of the folder; safetensors alone would leave them to their owner."""
    checkpoint(tmp_path / "final", OLMO1)
    before = os.umask(0o027)
    try:
        convert(tmp_path / "final", tmp_path / "hf", kind="hf", tokenizer=tokenizer)
        convert(tmp_path / "hf", tmp_path / "back", kind="safetensors")
    finally:
        os.umask(before)
    written = [path for kind in ("hf", "back") for path in (tmp_path / kind).iterdir()]
    assert {path.stat().st_mode & 0o777 for path in written} == {0o640}


def test_a_tokenizer_that_is_there_stays(tmp_path: Path, tokenizer: Path) -> None:
    checkpoint(tmp_path / "final", OLMO1)
    for given in (tokenizer, tmp_path / "hf/../hf/tokenizer.json"):
        convert(tmp_path / "final", tmp_path / "hf", kind="hf", tokenizer=given)
        assert (tmp_path / "hf/tokenizer.json").read_bytes() == tokenizer.read_bytes()


@pytest.mark.parametrize("name", EXPRESSED)
def test_a_folder_of_somebody_elses(name: str, tmp_path: Path, tokenizer: Path) -> None:
    """Written by transformers, in several files, without our config.yaml: the same logits."""
    from transformers import AutoModelForCausalLM

    ours = checkpoint(tmp_path / "final", EXPRESSED[name])
    convert(tmp_path / "final", tmp_path / "hf", kind="hf", tokenizer=tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    convert(tmp_path / "theirs", tmp_path / "back", kind="safetensors")
    ids = torch.randint(2, 300, (2, 100))
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "back")(ids).logits, ours(ids).logits)


@pytest.mark.parametrize("name", EXPRESSED)
def test_saved_again_by_transformers(name: str, tmp_path: Path, tokenizer: Path) -> None:
    """Loaded and saved in place, as after some fine-tuning there; config.yaml is still ours."""
    from transformers import AutoModelForCausalLM

    checkpoint(tmp_path / "final", EXPRESSED[name])
    hf = convert(tmp_path / "final", tmp_path / "hf", kind="hf", tokenizer=tokenizer)
    AutoModelForCausalLM.from_pretrained(hf).save_pretrained(hf)
    assert "rope_theta" not in json.loads((hf / "config.json").read_text())
    convert(hf, tmp_path / "back", kind="safetensors")
    for file in ("model.safetensors", "config.yaml"):
        assert (tmp_path / "final" / file).read_bytes() == (tmp_path / "back" / file).read_bytes()


@pytest.mark.parametrize("key", REFUSED)
def test_what_transformers_cannot_express_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=rf"cannot express.*model\.{key}="):
        huggingface.build_config_json(ModelConfig.new(**REFUSED[key]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "expected model_type olmo or olmo2, found 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act: expected silu, found gelu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type"),
        ({"head_dim": 16}, "head_dim"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"eos_token_id": None, "pad_token_id": None}, "eos_token_id"),
    ],
)
def test_what_we_cannot_express_is_refused(change: dict[str, Any], message: str) -> None:
    settings = huggingface.build_config_json(ModelConfig.new(**OLMO1))
    with pytest.raises(ValueError, match=message):
        huggingface.parse_config_json(settings | change)


def test_bad_folders(tmp_path: Path, tokenizer: Path) -> None:
    checkpoint(tmp_path / "final", OLMO1)
    hf = convert(tmp_path / "final", tmp_path / "hf", kind="hf", tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"expected optimizer state.*--kind safetensors"):
        convert(hf, tmp_path / "x", kind="unsharded")
    settings = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 1}))
    with pytest.raises(ValueError, match=r"num_hidden_layers=1, config.yaml 2"):
        convert(hf, tmp_path / "x", kind="safetensors")
    (hf / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"hf/config\.json is not readable as JSON"):
        convert(hf, tmp_path / "x", kind="safetensors")
    (hf / "config.json").write_text(json.dumps(settings | {"hidden_size": None}))
    with pytest.raises(ValueError, match="expected a number as hidden_size"):
        convert(hf, tmp_path / "x", kind="safetensors")
    (hf / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 1}))
    (hf / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"that config.json describes, found model.layers.1"):
        convert(hf, tmp_path / "x", kind="safetensors")
    (hf / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"expected the weight model.layers.2"):
        convert(hf, tmp_path / "x", kind="safetensors")
    (hf / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no such file"):
        convert(hf, tmp_path / "x", kind="safetensors")
    checkpoint(tmp_path / "small", OLMO1 | {"vocab_size": 200, "embedding_size": 200})
    with pytest.raises(ValueError, match="another model's tokenizer"):
        convert(tmp_path / "small", tmp_path / "y", kind="hf", tokenizer=tokenizer)
    checkpoint(tmp_path / "ends", OLMO1 | {"eos_token_id": 350})
    with pytest.raises(ValueError, match=r"model\.eos_token_id is 350"):
        convert(tmp_path / "ends", tmp_path / "z", kind="hf", tokenizer=tokenizer)


@pytest.mark.slow
def test_writing_needs_no_transformers(tmp_path: Path, tokenizer: Path) -> None:
    checkpoint(tmp_path / "final", OLMO2)
    words = ["checkpoint", "convert", str(tmp_path / "final"), str(tmp_path / "hf")]
    words += ["--kind", "hf", "--tokenizer", str(tokenizer)]
    script = (
        f"import sys; sys.modules['transformers'] = None; import olmo.cli; olmo.cli.main({words})"
    )
    subprocess.run(
        [sys.executable, "-c", script], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert (tmp_path / "hf/model.safetensors").exists()


PROMPTS = [
    "def __init__(self):",
    "import os",
    "The",
    "class A:\n    ",
    "for name in",
    "    return",
    "# An",
    "naïve café",
    "raise ValueError(",
    "x = [1, 2, 3]\n",
]


@pytest.mark.parametrize("settings", [OLMO1, OLMO2], ids=["olmo", "olmo2"])
@pytest.mark.slow
def test_greedy_text_is_ours(settings: dict[str, Any], tmp_path: Path, tokenizer: Path) -> None:
    """Ten prompts, 64 tokens: by `generate` and by the pipeline, as a user calls it."""
    from transformers import AutoTokenizer, pipeline

    ours = checkpoint(tmp_path / "final", settings | {"vocab_size": 300, "embedding_size": 300})
    convert(tmp_path / "final", tmp_path / "hf", kind="hf", tokenizer=tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (theirs.eos_token, theirs.pad_token) == ("<|endoftext|>", "<|padding|>")
    write = pipeline("text-generation", model=str(tmp_path / "hf"), device="cpu")
    for prompt in PROMPTS:
        ids = theirs(prompt, return_tensors="pt").input_ids
        new = ours.generate(ids, max_steps=64).token_ids[0, 0]
        expected = prompt + theirs.decode(new, skip_special_tokens=True)
        (found,) = write(prompt, do_sample=False, max_new_tokens=64)
        assert found["generated_text"] == expected


CONVERSATION = [
    {"role": "system", "content": " Be brief.\n"},
    {"role": "user", "content": "What is a list?"},
    {"role": "assistant", "content": "  A sequence, naïvely said.  "},
    {"role": "user", "content": "And a\n\ndict?"},
    {"role": "assistant", "content": "A mapping."},
]


def test_a_conversation_becomes_what_was_trained_on(tmp_path: Path, tokenizer: Path) -> None:
    """The template's ids are those of OLMo's preparation: message by message, part by part."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    checkpoint(tmp_path / "final", OLMO1)
    convert(tmp_path / "final", tmp_path / "hf", kind="hf", tokenizer=tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template is None
    tuned = to_yaml({"data": {"label_mask_paths": ["labels.npy"]}})
    with (tmp_path / "final/config.yaml").open("a") as file:
        file.write(tuned)
    convert(tmp_path / "final", tmp_path / "chat", kind="hf", tokenizer=tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "chat")

    base = Tokenizer.from_file(str(tokenizer))
    expected = [0]
    for message in CONVERSATION:
        end = "<|endoftext|>\n" if message["role"] == "assistant" else "\n"
        expected += base.encode(f"<|{message['role']}|>\n").ids
        expected += base.encode(message["content"].strip() + end).ids
    found = theirs.apply_chat_template(CONVERSATION, tokenize=True, return_dict=True)
    assert found["input_ids"] == expected
    asked = theirs.apply_chat_template(CONVERSATION[:2], tokenize=False, add_generation_prompt=True)
    assert asked == (
        "<|endoftext|><|system|>\nBe brief.\n<|user|>\nWhat is a list?\n<|assistant|>\n"
    )


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (
            {"steps": 5, "tokens": 640, "heldout_loss": {"x": {"first": 6.0, "last": 5.0}}},
            ("640 tokens of training", "| Steps | 5,", "| x | 6.0000 | 5.0000 |"),
        ),
        ({"checkpoints": 3, "parameters": 9}, ("the mean of 3 checkpoints", "None so far")),
    ],
    ids=["run", "soup"],
)
def test_the_card_of(facts: dict[str, Any], said: tuple[str, ...], tmp_path: Path) -> None:
    checkpoint(tmp_path / "final", OLMO1)
    action = {"stage": "training", "version": 3, "params": {}, "inputs": {}}
    record = {"key": "k", "content": "c", "action": action, "facts": facts, "outputs": {}}
    (tmp_path / "final/record.json").write_text(sealed.dumps(record))
    settings = huggingface.build_config_json(ModelConfig.new(**OLMO1))
    text = card("it", settings, 9, tmp_path / "final", Store(tmp_path / "store"))
    assert text.startswith("---\nlibrary_name: transformers\n") and "# it\n" in text
    for phrase in said:
        assert phrase in text
    assert ("| Steps |" in text) == ("steps" in facts)


@pytest.mark.slow
def test_the_card_tells_where_a_tuned_run_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its conversations and the checkpoint that it was given, here or by URL."""
    monkeypatch.setenv("OLMO_STORE", str(tmp_path / "store"))
    final = tmp_path / "final"
    checkpoint(final, OLMO1)
    (final / "train.json").write_text("{}")
    talk = {"messages": [{"role": "user", "content": "What?"}]}
    (tmp_path / "talks.jsonl").write_text(json.dumps(talk) + "\n")
    texts = [tmp_path / f"{n}.txt" for n in range(3)]
    for text in texts:
        text.write_text(text.name)
    with web_server(tmp_path) as web:
        url = f"{web}/final"
        made = [
            local_conversations(file=tmp_path / "talks.jsonl", source=tmp_path / "talks.gz"),
            download_conversations(url=f"{web}/talks.jsonl", source=tmp_path / "web.gz"),
            stdlib_questions(folder=tmp_path / "questions", shards=1, library="L"),
            local_checkpoint(
                files=sorted(final.iterdir()), folder=final, checkpoint=tmp_path / "a"
            ),
            fetched_checkpoint(url=url, checkpoint=tmp_path / "b"),
            converted(files=texts, names=["0.txt", "1.txt", "2.txt"], source=tmp_path / "c.gz"),
            converted(files=texts[:1], names=["0.txt"], source=tmp_path / "d.gz"),
        ]
        file = fetched(url=f"{web}/1.txt", file=tmp_path / "1.arrived")
        parts = {"files": [tmp_path / "1.arrived"], "names": [file["facts"]["url"]]}
        made.append(converted(**parts, source=tmp_path / "e.gz"))  # one source with what it is of
    inputs = {record["key"]: [file["sha256"] for file in output_files(record)] for record in made}
    action = {"stage": "training", "version": 3, "params": {}, "inputs": inputs}
    facts = {"steps": 5, "tokens": 640}
    record = {"key": "k", "content": "c", "action": action, "facts": facts, "outputs": {}}
    (final / "record.json").write_text(sealed.dumps(record))
    settings = huggingface.build_config_json(ModelConfig.new(**OLMO1))
    text = card("it", settings, 9, final, Store(tmp_path / "store"))
    sources = text.partition("Sources:")[2]
    for name in ("a local file", f"{web}/talks.jsonl", "standard library of", "a local checkpoint"):
        assert f"| {name}" in sources
    assert "| 3 local files |" in sources and f"| {web}/1.txt |" in sources
    assert f"| {url} |" in sources and sources.count("\n| ") == 2 + len(made)
    assert str(tmp_path) not in text, "where a file lay is nobody's business"
