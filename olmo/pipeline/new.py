"""`olmo new`: a recipe, a training config and a run that fit a folder of text and this machine."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import textwrap
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from olmo.config import PROJECT_CONFIG, read_project_config
from olmo.config.strict import check_range
from olmo.corpus.formats import DocumentUnit
from olmo.io import sealed, untrusted
from olmo.pipeline.plan import Plan
from olmo.pipeline.recipe import recipe_path
from olmo.pipeline.survey import HELDOUT_SHARES, TEXT_FIELDS, Survey, survey
from olmo.runtime.log import format_count, format_duration, format_number

CONFIG = Path(PROJECT_CONFIG)
# Width, layers and heads of models, by size; 16 · layers · width² parameters besides embeddings.
SHAPES = (
    *((64, 2, 2), (128, 2, 4), (128, 4, 4), (256, 4, 4), (256, 8, 4), (384, 8, 6)),
    *((512, 8, 8), (512, 12, 8), (768, 12, 12), (1024, 16, 16), (1536, 16, 12), (2048, 16, 16)),
)
# Training tokens for each parameter where both cost least (Hoffmann et al. 2022, "Chinchilla").
TOKENS_PER_PARAMETER = 20
# So many epochs are nearly as good as new text (Muennighoff et al. 2023).
MAX_EPOCHS = 4
EFFICIENCY = 0.4  # of a large matrix product, that training reaches
MAX_BATCH_TOKENS = 1 << 19
MIN_TOKENS = 2000  # below, nothing can be learned
SHORTEST = 64  # instance, in tokens; longer where there is text for so many steps and instances:
STEPS, LEAST_BATCH = 300, 4
LEAST_STEPS = 20
WHY = {
    DocumentUnit.row: "some have no id of their own",
    DocumentUnit.line: "a file has too much text for one",
}
MANY_JOBS = 50  # of a stage; each takes seconds to start
LEAST_HELDOUT = 4  # instances; fewer say nothing


@dataclass(frozen=True)
class Machine:
    """What trains: a GPU or the CPU, and its speed."""

    device: str
    name: str
    flops: float  # per second, of a large matrix product


@dataclass(frozen=True)
class Choice:
    """The numbers of a run."""

    vocab_size: int
    bytes_per_token: float
    heldout_share: float
    tokens: int  # of one epoch
    width: int
    layers: int
    heads: int
    sequence_length: int
    batch_size: int  # instances
    steps: int
    seconds: float

    @property
    def parameters(self) -> int:
        return self.vocab_size * self.width + count_inner(self.width, self.layers)

    @property
    def epochs(self) -> float:
        return self.steps * self.batch_size * self.sequence_length / self.tokens


def new(name: str, folder: str, /, hours: float | None = None) -> None:
    """Write the configs of a first run on a folder of text, and print what to type.

    Looks at the files of FOLDER (text, JSON lines, parquet, csv; gz or zst), and writes
    config/data/NAME.yaml, config/train/NAME.yaml and the run NAME in config/config.yaml, each
    number with its reason. `hours` of training (0.2 on a CPU, 12 on a GPU) and the text decide the
    size of the model.

    Args:
        name: of the data set and of the run
        folder: with the files of text
        hours: of training, 0.2 on a CPU and 12 on a GPU if not given

    Example: olmo new novels ~/texts
    """
    plan, before = Plan(read_project_config()), CONFIG.read_text(encoding="utf-8")
    if not re.fullmatch(r"[\w.-]+", name) or yaml.safe_load(name) != name:
        raise ValueError(
            f"expected a name of letters, digits, dots and dashes, found {name!r}; give another one"
        )
    untrusted.check_part(name, "olmo new")
    check_range("--hours", hours, 0.01)
    files = {"recipe": recipe_path(name), "train": Path(f"config/train/{name}.yaml")}
    taken = [str(path) for path in files.values() if path.exists()]
    taken += [f"the run {name} in {CONFIG}"] * plan.is_made_here(name)
    if taken:
        raise ValueError(f"expected a new name, found {', '.join(taken)}; give another name")
    found = survey(os.path.expanduser(folder).rstrip("/"), files["recipe"])
    machine = measure_machine()
    choice = choose(found, machine, hours or (12.0 if machine.device == "cuda" else 0.2))
    texts = {
        files["recipe"]: format_recipe(name, found, choice),
        files["train"]: format_train(name, choice, machine),
        CONFIG: add_run(before, name, {"train": f"config/train/{name}.yaml", "dataset": name}),
    }
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        sealed.write_atomic(path, text)
    Plan(yaml.safe_load(texts[CONFIG])).train_config(name)  # raises if they do not fit together
    jobs = -(-found.sources // plan.pipeline.shards_per_job)
    print(format_summary(name, found, choice, machine, jobs))


def count_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def measure_machine() -> Machine:
    """The device that training takes, and its speed by a few large products."""
    import torch

    cuda = torch.cuda.is_available()
    device, kind = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    size, count = (8192, 8) if cuda else (1024, 8)
    a = torch.ones(size, size, dtype=kind, device=device)
    for _ in range(2):  # the first one loads kernels
        start = time.perf_counter()
        for _ in range(count - 1):
            b = a @ a
        b.sum().item()
        seconds = time.perf_counter() - start
    name = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
    return Machine(device, name, count * 2 * size**3 / seconds)


def choose(found: Survey, machine: Machine, hours: float) -> Choice:
    """The numbers that fit a text and a machine."""
    vocab_size, bytes_per_token = choose_vocabulary(found)
    budget = machine.flops * EFFICIENCY * hours * 3600
    longest = 256 if machine.device == "cpu" else 1024
    while longest >= SHORTEST:
        sequence_length, longest = longest, longest // 2
        instance_bytes = sequence_length * bytes_per_token
        share = choose_heldout_share(found, instance_bytes)
        instances, _ = found.count_instances(share, instance_bytes)
        tokens = instances * sequence_length
        (width, layers, heads), trained = choose_shape(tokens, vocab_size, budget)
        if STEPS * LEAST_BATCH * sequence_length <= trained:
            break
    if tokens < MIN_TOKENS:
        raise too_little_text(found)
    batch_size = max(
        LEAST_BATCH, min(MAX_BATCH_TOKENS, floor_power(trained / STEPS)) // sequence_length
    )
    batch_size = min(batch_size, instances)
    steps = max(LEAST_STEPS, trained // (batch_size * sequence_length))
    per_token = count_flops(vocab_size, width, layers)
    return Choice(
        vocab_size=vocab_size,
        bytes_per_token=bytes_per_token,
        heldout_share=share,
        tokens=tokens,
        width=width,
        layers=layers,
        heads=heads,
        sequence_length=sequence_length,
        batch_size=batch_size,
        steps=steps,
        seconds=steps * batch_size * sequence_length * per_token / (machine.flops * EFFICIENCY),
    )


def choose_shape(tokens: int, vocab_size: int, budget: float) -> tuple[tuple[int, int, int], int]:
    """((width, layers, heads), training tokens) for so many tokens of text and so many FLOPs."""
    most = MAX_EPOCHS * tokens
    shape = SHAPES[0]
    for width, layers, heads in SHAPES:
        wanted = TOKENS_PER_PARAMETER * count_inner(width, layers)
        if wanted <= most and wanted * count_flops(vocab_size, width, layers) <= budget:
            shape = (width, layers, heads)
    width, layers, _ = shape
    return shape, min(most, int(budget / count_flops(vocab_size, width, layers)))


def count_inner(width: int, layers: int) -> int:
    """Parameters besides embeddings."""
    return 16 * layers * width**2


def count_flops(vocab_size: int, width: int, layers: int) -> int:
    """FLOPs of training for each token, forward and backward."""
    return 6 * (count_inner(width, layers) + vocab_size * width)


def floor_power(number: float) -> int:
    """The largest power of two that is not above a number; at least 1."""
    return 1 << max(0, int(math.log2(max(1.0, number))))


def choose_vocabulary(found: Survey) -> tuple[int, float]:
    """(vocabulary size, bytes of text for each token), by a tokenizer trained on the sample.

    A power of two with some 500 bytes of text for each entry, so that all are learned.
    """
    from olmo.corpus.tokenizer import train_byte_level

    size = min(max(floor_power(found.text_bytes / 500), 512), 32_768)
    sample = found.training_sample
    while (tokenizer := train_byte_level(iter(sample), size)).get_vocab_size() < size:
        size //= 2
        if size < 512:
            raise too_little_text(found)
    total = sum(len(text.encode()) for text in sample)
    tokens = sum(len(encoded.ids) + 1 for encoded in tokenizer.encode_batch(sample))
    return size, total / tokens


def too_little_text(found: Survey) -> ValueError:
    remedy = "add text"
    if found.sources > 1:
        remedy += ", or join the files, since an instance has text of one file"
    return ValueError(
        f"expected text of at least some {MIN_TOKENS:,} tokens, found {found.text_bytes:,} bytes "
        f"in {format_number(found.documents, 'document')} of "
        f"{format_number(found.files, 'file')}; {remedy}"
    )


def choose_heldout_share(found: Survey, instance_bytes: float) -> float:
    """The smallest share that holds out a few instances; 0.0 if none does."""
    for share in HELDOUT_SHARES:
        _, instances = found.count_instances(share, instance_bytes)
        if instances >= LEAST_HELDOUT and found.heldout_bytes(share) <= found.text_bytes / 3:
            return share
    return 0.0


def format_recipe(name: str, found: Survey, choice: Choice) -> str:
    """config/data/NAME.yaml."""
    about = "" if found.is_whole else "about "
    rows = found.rows
    lines = [
        "# yaml-language-server: $schema=../schema/data.json",
        f"# {format_number(found.files, 'file')}: {about}"
        f"{format_number(found.documents, 'document')}, "
        f"{format_count(found.text_bytes)}B of text, some {format_count(choice.tokens)} tokens.",
        "sources:",
        f"  files: {quote(found.patterns)}",
    ]
    if rows.text_field != "text":
        why = "" if rows.text_field in TEXT_FIELDS else " # the longest field"
        lines.append(f"  text_field: {quote(rows.text_field)}{why}")
    if rows.id_field:
        lines.append(f"  id_field: {quote(rows.id_field)}")
    if rows.one_document_per:
        lines.append(f"  one_document_per: {rows.one_document_per} # {WHY[rows.one_document_per]}")
    lines += ["documents:", "  keep_one_in: 1 # every document; 10 keeps one in ten"]
    held = found.heldout_bytes(choice.heldout_share)
    why = f"# {format_count(held)}B of text to measure the loss on, by the hash of ids"
    if not choice.heldout_share:
        why = "# too few documents to hold one out, so there is no held-out loss; add some"
    lines.append(f"  heldout_share: {choice.heldout_share} {why}")
    if found.drops:
        counts = ", ".join(format_drops(found))
        lines.append(f"  allow: [{', '.join(found.drops)}] # left out: {counts}")
    lines += [
        "tokenizer:",
        f"  train_vocab_size: {choice.vocab_size} # "
        f"{format_count(found.text_bytes / choice.vocab_size)}B of text for each entry; "
        f"{choice.bytes_per_token:.1f} bytes a token",
        "  eos_token_id: 0",
        "  pad_token_id: 1",
    ]
    return "\n".join(lines) + "\n"


def quote(value: str | list[str]) -> str:
    """A value as YAML."""
    return json.dumps(value, ensure_ascii=False)


def format_drops(found: Survey) -> list[str]:
    """How many rows are left out, why, and where the first of them is."""
    lines = []
    for reason, count in found.drops.most_common():
        place = found.first_drops[reason]
        place = place if place.isprintable() else repr(place)
        lines.append(f"{count:,} × {reason} ({place}{' …' * (count > 1)})")
    return lines


def format_train(name: str, choice: Choice, machine: Machine) -> str:
    """config/train/NAME.yaml, from new_train.yaml."""
    gpu, inner = machine.device == "cuda", count_inner(choice.width, choice.layers)
    batch_tokens, threads = choice.batch_size * choice.sequence_length, min(count_cores(), 8)
    values = dataclasses.asdict(choice) | {
        "name": name,
        "machine": machine.name,
        "parameters": format_count(choice.parameters),
        "inner": format_count(inner),
        "ratio": choice.steps * batch_tokens / inner,
        "best": TOKENS_PER_PARAMETER,
        "learning_rate": min(4e-3, 0.5 / choice.width),
        "warmup": max(5, choice.steps // 20),
        "epochs": choice.epochs,
        "max_epochs": MAX_EPOCHS,
        "batch_tokens": batch_tokens,
        "for_steps": f", for some {STEPS} steps or more" if choice.steps >= STEPS else "",
        "micro": min(choice.batch_size, 16 if gpu else 8),
        "precision": "amp_bf16" if gpu else "fp32",
        "threads": f"intra_op_threads: {threads} # another number gives other bits\n" * (not gpu),
        "save_interval": max(1, choice.steps // 3),
        "eval_interval": max(1, choice.steps // 4),
    }
    template = Path(__file__).with_name("new_train.yaml").read_text(encoding="utf-8")
    return template.format(**values)


def add_run(config: str, name: str, settings: Mapping[str, Any]) -> str:
    """The text of config/config.yaml with one run more, its comments kept.

    Raises ValueError if it has no line `runs:`.
    """
    lines = yaml.safe_dump({name: dict(settings)}, sort_keys=False, width=999)
    first = re.search(r"(?m)^runs:[ \t]*(?:#.*)?\n(?:[ \t]*(?:#.*)?\n)*( +)\S", config)
    entry = textwrap.indent(lines, first[1] if first else "  ")  # as deep as the other runs
    before = yaml.safe_load(config)
    added, count = re.subn(
        r"(?m)^runs:[ \t]*(#.*)?\n", lambda m: m.group() + entry, config, count=1
    )
    wanted = {**before, "runs": {**(before.get("runs") or {}), name: dict(settings)}}
    if not count or yaml.safe_load(added) != wanted:
        raise ValueError(f"{CONFIG}: expected a line `runs:` to add a run below; add\n{entry}")
    return added


def format_summary(name: str, found: Survey, choice: Choice, machine: Machine, jobs: int) -> str:
    """What was found and written, and the command to type. `jobs` are those of a stage."""
    about = "" if found.is_whole else "about "
    held_out = f"{choice.heldout_share:.0%}" if choice.heldout_share else "none, too few documents"
    left_out = ", ".join(f"{count:,} {suffix}" for suffix, count in found.left_out.most_common(5))
    lines = [
        f"{format_number(found.files, 'file')}, {about}"
        f"{format_number(found.documents, 'document')}, "
        f"{format_count(found.text_bytes)}B of text, some {format_count(choice.tokens)} tokens",
        *([f"  not text, left out: {left_out}"] if left_out else []),
        *(f"  left out: {drop}" for drop in format_drops(found)),
        *(
            [f"  {jobs:,} jobs a stage: join the files, or set a larger shards_per_job in {CONFIG}"]
            if jobs > MANY_JOBS
            else []
        ),
        f"{recipe_path(name)}  held out: {held_out}",
        f"config/train/{name}.yaml  {format_count(choice.parameters)} parameters, {choice.steps:,} "
        f"steps, about {format_duration(choice.seconds + 60)} on {machine.name}",
        "",
        "Train it:",
        f"  uv run snakemake --cores {count_cores()} checkpoints/{name}/final",
    ]
    return "\n".join(lines)
