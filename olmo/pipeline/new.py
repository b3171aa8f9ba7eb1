"""`olmo new`: a recipe, a training config and a run that fit a folder of text and this machine."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from olmo.io import sealed, untrusted
from olmo.pipeline.plan import Plan
from olmo.pipeline.recipe import recipe_path
from olmo.pipeline.survey import Survey, survey
from olmo.runtime.log import format_count, format_duration

CONFIG = Path("config/config.yaml")
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
    length: int  # of an instance
    batch: int  # instances
    steps: int
    seconds: float

    @property
    def parameters(self) -> int:
        return self.vocab_size * self.width + 16 * self.layers * self.width**2

    @property
    def epochs(self) -> float:
        return self.steps * self.batch * self.length / self.tokens


def new(name: str, folder: str, /, hours: float | None = None) -> None:
    """Write the configs of a first run on a folder of text, and print what to type.

    Looks at the files of FOLDER (text, JSON lines, parquet, csv; gz or zst), and writes
    config/data/NAME.yaml, config/train/NAME.yaml and the run NAME in config/config.yaml, each
    number with its reason. `hours` of training (0.2 on a CPU, 12 on a GPU) and the text decide the
    size of the model.

    Example: olmo new novels ~/texts
    """
    files = {"recipe": recipe_path(name), "train": Path(f"config/train/{name}.yaml")}
    untrusted.check_part(name, "olmo new")
    before = CONFIG.read_text(encoding="utf-8") if CONFIG.exists() else "runs:\n"
    taken = [str(path) for path in files.values() if path.exists()]
    if not re.fullmatch(r"[\w.-]+", name) or name in (yaml.safe_load(before).get("runs") or {}):
        taken.append(f"the run {name} in {CONFIG}")
    if taken:
        raise ValueError(f"expected a new name, found {', '.join(taken)}; give another name")
    found = survey(os.path.expanduser(folder).rstrip("/"))
    machine = measure_machine()
    choice = choose(found, machine, hours or (12.0 if machine.device == "cuda" else 0.2))
    texts = {
        files["recipe"]: format_recipe(name, found, choice),
        files["train"]: format_train(name, choice, machine),
        CONFIG: add_run(before, name),
    }
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        sealed.write_atomic(path, text)
    Plan(yaml.safe_load(texts[CONFIG])).train_config(name)  # raises if they do not fit together
    print(format_summary(name, found, choice, machine))


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
    total = int(found.text_bytes / bytes_per_token)
    if total < MIN_TOKENS:
        raise too_little_text(found)
    # Wide enough for an instance of the held-out documents, of which too few say nothing.
    longest = 256 if machine.device == "cpu" else 1024
    length = min(longest, floor_power(total / 64))
    share = choose_heldout_share(found, 4 * length * bytes_per_token)
    tokens = int(total - found.heldout_bytes(share) / bytes_per_token)
    budget = machine.flops * EFFICIENCY * hours * 3600
    most = MAX_EPOCHS * tokens
    shape, trained = SHAPES[0], most
    for width, layers, heads in SHAPES:
        inner = 16 * layers * width**2
        wanted = min(TOKENS_PER_PARAMETER * inner, most)
        cost = 6 * (inner + vocab_size * width) * wanted
        if cost <= budget and TOKENS_PER_PARAMETER * inner <= most:
            shape, trained = (width, layers, heads), most
    width, layers, heads = shape
    per_token = 6 * (16 * layers * width**2 + vocab_size * width)
    trained = min(trained, int(budget / per_token))
    batch_tokens = max(4 * length, min(MAX_BATCH_TOKENS, floor_power(trained / 300)))
    batch = min(batch_tokens // length, max(1, tokens // length))
    steps = max(20, trained // (batch * length))
    seconds = steps * batch * length * per_token / (machine.flops * EFFICIENCY)
    return Choice(
        vocab_size,
        bytes_per_token,
        share,
        tokens,
        width,
        layers,
        heads,
        length,
        batch,
        steps,
        seconds,
    )


def floor_power(number: float) -> int:
    """The largest power of two that is not above a number; at least 1."""
    return 1 << max(0, int(math.log2(max(1.0, number))))


def choose_vocabulary(found: Survey) -> tuple[int, float]:
    """(vocabulary size, bytes of text for each token), by a tokenizer trained on the sample.

    A power of two with some 500 bytes of text for each entry, so that all are learned.
    """
    from olmo.corpus.tokenizer import train_byte_level

    size = min(max(floor_power(found.text_bytes / 500), 512), 32_768)
    while (tokenizer := train_byte_level(iter(found.sample), size)).get_vocab_size() < size:
        size //= 2
        if size < 512:
            raise too_little_text(found)
    total = sum(len(text.encode()) for text in found.sample)
    tokens = sum(len(encoded.ids) + 1 for encoded in tokenizer.encode_batch(found.sample))
    return size, total / tokens


def too_little_text(found: Survey) -> ValueError:
    return ValueError(
        f"expected text of at least some {MIN_TOKENS:,} tokens, found {found.text_bytes:,} bytes in "
        f"{found.documents:,} documents; add text"
    )


def choose_heldout_share(found: Survey, least_bytes: float) -> float:
    """The smallest share whose held-out documents fill a few instances; 0.0 if none does."""
    for share in (0.01, 0.02, 0.05, 0.1, 0.2):
        if least_bytes <= found.heldout_bytes(share) <= found.text_bytes / 3:
            return share
    return 0.0


def format_recipe(name: str, found: Survey, choice: Choice) -> str:
    """config/data/NAME.yaml."""
    about = "" if found.is_whole else "about "
    rows = found.rows
    lines = [
        f"# {found.files:,} files: {about}{found.documents:,} documents, "
        f"{format_count(found.text_bytes)}B of text, some {format_count(choice.tokens)} tokens.",
        "sources:",
        f"  files: {json.dumps(found.patterns, ensure_ascii=False)}",
    ]
    if rows.text_field != "text":
        lines.append(f"  text_field: {json.dumps(rows.text_field)} # the longest field")
    if rows.id_field:
        lines.append(f"  id_field: {json.dumps(rows.id_field)}")
    lines += ["documents:", "  keep_one_in: 1 # every document; 10 keeps one in ten"]
    held = found.heldout_bytes(choice.heldout_share)
    why = f"# {format_count(held)}B of text to measure the loss on, by the hash of ids"
    if not choice.heldout_share:
        why = "# too few documents to hold one out, so there is no held-out loss: add documents"
    lines.append(f"  heldout_share: {choice.heldout_share} {why}")
    if found.drops:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in found.drops.most_common())
        lines.append(f"  allow: [{', '.join(found.drops)}] # {counts}: these rows are left out")
    lines += [
        "tokenizer:",
        f"  train_vocab_size: {choice.vocab_size} # some 500 bytes of text for each entry; "
        f"{choice.bytes_per_token:.1f} bytes a token",
        "  eos_token_id: 0",
        "  pad_token_id: 1",
    ]
    return "\n".join(lines) + "\n"


def format_train(name: str, choice: Choice, machine: Machine) -> str:
    """config/train/NAME.yaml, from new_train.yaml."""
    gpu, inner = machine.device == "cuda", 16 * choice.layers * choice.width**2
    batch_tokens = choice.batch * choice.length
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
        "micro": min(choice.batch, 16 if gpu else 8),
        "precision": "amp_bf16" if gpu else "fp32",
        "threads": ""
        if gpu
        else f"intra_op_threads: {min(os.cpu_count() or 1, 8)} # decides bits\n",
        "save_interval": max(1, choice.steps // 3),
        "eval_interval": max(1, choice.steps // 4),
    }
    template = Path(__file__).with_name("new_train.yaml").read_text(encoding="utf-8")
    return template.format(**values)


def add_run(config: str, name: str) -> str:
    """The text of config/config.yaml with one run more, its comments kept."""
    entry = f"  {name}:\n    train: config/train/{name}.yaml\n    dataset: {name}\n"
    before = yaml.safe_load(config)
    added, count = re.subn(
        r"(?m)^runs:[ \t]*(#.*)?\n", lambda m: m.group() + entry, config, count=1
    )
    runs = {name: {"train": f"config/train/{name}.yaml", "dataset": name}}
    wanted = {**before, "runs": {**(before.get("runs") or {}), **runs}}
    if not count or yaml.safe_load(added) != wanted:
        raise ValueError(f"{CONFIG}: expected a line `runs:` to add a run below; add\n{entry}")
    return added


def format_summary(name: str, found: Survey, choice: Choice, machine: Machine) -> str:
    """What was found and written, and the command to type."""
    about = "" if found.is_whole else "about "
    left_out = ", ".join(f"{count:,} {suffix}" for suffix, count in found.left_out.most_common(5))
    cores = os.cpu_count() or 1
    lines = [
        f"{found.files:,} files, {about}{found.documents:,} documents, "
        f"{format_count(found.text_bytes)}B of text, some {format_count(choice.tokens)} tokens",
        *([f"  not text, left out: {left_out}"] if left_out else []),
        *(f"  {count:,} rows left out: {reason}" for reason, count in found.drops.most_common()),
        f"{recipe_path(name)}  held out: {choice.heldout_share:.0%}",
        f"config/train/{name}.yaml  {format_count(choice.parameters)} parameters, {choice.steps:,} "
        f"steps, about {format_duration(choice.seconds + 60)} on {machine.name}",
        "",
        "Train it:",
        f"  uv run snakemake --cores {cores} checkpoints/{name}/final",
    ]
    return "\n".join(lines)
