"""Text that a run's checkpoints write: how it changes from step to step."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from olmo.checkpoint.layout import list_checkpoints, parse_step
from olmo.config import TrainConfig
from olmo.io import gz
from olmo.runtime.log import log
from olmo.runtime.numbers import from_json
from olmo.store.record import Record
from olmo.store.stage import Facts, Input, Inputs, Output, Unhashed, current_store, stage
from olmo.store.store import Store

TOKENS, TEMPERATURE, SEED = 64, 0.7, 0
PROMPT_CHARACTERS = 80
WEIGHTS = ("model.safetensors", "model.pt")


@stage(version=1)
def samples(
    weights: Inputs,
    tokenizer: Input,
    model: dict[str, Any],
    prompts: list[str],
    chat: bool,
    text: Output,
    checkpoint: Unhashed[Path],
    step: int,
    training: str,
    tokens: int = TOKENS,
    temperature: float = TEMPERATURE,
    seed: int = SEED,
) -> Facts:
    """Continue prompts with a checkpoint, and write them and their texts as JSON.

    `model` is the config of the model. `training` is the key of the run's action: two runs that
    have the same weights at a step each have a record.
    """
    from olmo.inspect.generate import encode_prompt, generate_ids, load_fast_model, seed_generator
    from olmo.tokenizer import Tokenizer

    ends = {"eos_token_id": model["eos_token_id"], "pad_token_id": model["pad_token_id"]}
    words, loaded = Tokenizer.from_file(tokenizer, **ends), load_fast_model(str(checkpoint))
    found = []
    for prompt in prompts:
        ids = encode_prompt(prompt, words, chat)
        new = generate_ids(
            loaded, ids, max_steps=tokens, temperature=temperature, generator=seed_generator(seed)
        )
        found.append({"prompt": prompt, "text": words.decode(list(new))})
    text.write_text(json.dumps(found, ensure_ascii=False, indent=1), encoding="utf-8")
    return {"step": step, "training": training}


def sample_checkpoints(
    run: Path, cfg: TrainConfig, tokenizer: Path, training: str, most: int, prompts: list[str]
) -> None:
    """Sample the checkpoints of a run that are on the disk, at most `most`; each once.

    Args:
        run: checkpoints/<run>.
        training: the key of the run's action.
    """
    places = {
        parse_step(path): path
        for path in list_checkpoints(run / "run", unsharded=True)
        if any((path / name).exists() for name in WEIGHTS)
    }
    if (final := run / "final" / "train.json").exists():
        places[from_json(final.read_bytes())["global_step"]] = final.parent
    steps = sorted(step for step in places if step)
    chosen = {steps[round(i * (len(steps) - 1) / max(most - 1, 1))] for i in range(most) if steps}
    current_store().create()
    for step in sorted(chosen):
        place = places[step]
        files = [place / name for name in WEIGHTS if (place / name).exists()]
        out = run / "samples" / f"step-{step}.json"
        log.info(f"samples: {place}")
        samples(
            weights=files,
            tokenizer=tokenizer,
            model=dataclasses.asdict(cfg.model),
            prompts=prompts,
            chat=bool(cfg.data.label_mask_paths),
            text=out,
            checkpoint=place,
            step=step,
            training=training,
        )


def read_samples(
    store: Store, trainings: set[str], made_by: dict[str, list[Record]]
) -> list[dict[str, Any]]:
    """All samples of a run that the store has: {"step", "prompt", "text"}, by prompt and step.

    Args:
        trainings: the keys of the run's actions.
        made_by: of `records_by_content`.
    """
    found: dict[tuple[str, int], str] = {}
    for record in (one for records in made_by.values() for one in records):
        facts = record["facts"]
        path = store.object_path(record["outputs"].get("text", {}).get("sha256", "-" * 64))
        is_ours = record["action"]["stage"] == "samples" and facts.get("training") in trainings
        if is_ours and path.exists():
            for one in json.loads(path.read_bytes()):
                found[one["prompt"], facts["step"]] = one["text"]
    return [{"step": s, "prompt": p, "text": found[p, s]} for p, s in sorted(found)]


def choose_prompts(store: Store, heldout: list[Record]) -> list[str]:
    """Prompts for a run: a document's start, and the first words of one that was held out.

    Of conversations the first question.

    Args:
        heldout: actions with an output `heldout`.
    """
    for record in heldout:
        path = store.object_path(record["outputs"]["heldout"]["sha256"])
        if not path.exists():
            continue
        with gz.reading(path) as lines:
            line = next(iter(lines), None)
        if line is None:
            continue
        document = json.loads(line, parse_int=float)
        asked = [m["content"] for m in document.get("messages", ()) if m.get("role") == "user"]
        if asked and isinstance(asked[0], str):
            return asked[:1]
        start = str(document.get("text") or "")[:PROMPT_CHARACTERS]
        if start.strip():
            return ["", start.rsplit(None, 1)[0] if " " in start.strip() else start]
    return [""]
