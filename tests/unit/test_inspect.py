"""Which instances a run saw at a step: what its loader gives, from the order alone."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from servers import web_server
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from olmo.config import DataConfig, TrainConfig
from olmo.data import order
from olmo.data.batches import OrderedDataset
from olmo.data.order import parse_steps
from olmo.inspect.commands import inspect, seen
from olmo.inspect.order import SeenInstances


def config(batch_size: int, drop_last: bool) -> TrainConfig:
    return TrainConfig.new(
        global_train_batch_size=batch_size, seed=11, data={"drop_last": drop_last}
    )


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize(("n", "batch_size", "world_size"), [(50, 8, 1), (51, 8, 4), (48, 6, 3)])
@pytest.mark.parametrize("fitted", [True, False])
def test_steps_are_what_the_loader_gives(n, batch_size, world_size, drop_last, fitted):
    cfg = config(batch_size, drop_last)
    stored = order.global_indices(n, 11)
    if fitted:  # as OLMo writes it
        stored = order.fit_to_world_size(stored, world_size, drop_last)
    seen = SeenInstances(cfg, n, len(stored), lambda a, b: stored[a:b], world_size)
    for rank in range(world_size):
        dataset = OrderedDataset(
            range(n),
            batch_size,
            seed=11,
            drop_last=drop_last,
            world_size=world_size,
            rank=rank,
        )
        each = batch_size // world_size
        for epoch in (0, 1):
            dataset.reshuffle(epoch)
            mine = dataset.rank_indices()
            for step in range(seen.steps_per_epoch):
                found = seen.instances(epoch * seen.steps_per_epoch + step + 1, rank)
                assert found.tolist() == mine[step * each : (step + 1) * each].tolist()


def test_what_does_not_fit_is_refused():
    stored = order.global_indices(50, 11)
    for n, drop_last in ((49, True), (60, True), (51, False), (50 - 8, False)):
        with pytest.raises(ValueError, match=f"expected an order of {n} instances"):
            SeenInstances(config(8, drop_last), n, 50, lambda a, b: stored[a:b])
    with pytest.raises(ValueError, match="world size that divides"):
        SeenInstances(config(8, True), 50, 50, lambda a, b: stored[a:b], world_size=3)
    seen = SeenInstances(config(8, True), 50, 50, lambda a, b: stored[a:b], world_size=2)
    with pytest.raises(ValueError, match="rank from 0 to 1"):
        seen.instances(1, 2)
    with pytest.raises(ValueError, match="from 1 on"):
        seen.instances(0)
    assert parse_steps("5..9") == range(5, 10) and parse_steps("4") == range(4, 5)
    with pytest.raises(ValueError, match=r"expected steps as 5 or 5\.\.9"):
        parse_steps("5-9")
    with pytest.raises(ValueError, match=r"the earlier step first, as 5\.\.9, found '9\.\.5'"):
        parse_steps("9..5")


def test_reading_a_step_reads_only_that_part_of_the_order():
    stored, read = order.global_indices(1000, 11), []

    def part(start: int, stop: int) -> np.ndarray:
        read.append((start, stop))
        return stored[start:stop]

    assert (
        SeenInstances(config(8, True), 1000, 1000, part).instances(3).tolist()
        == stored[16:24].tolist()
    )
    assert read == [(16, 24)]


def test_when_is_the_inverse_of_what_a_step_saw():
    stored = order.global_indices(50, 11)
    seen = SeenInstances(config(8, True), 50, 50, lambda a, b: stored[a:b], world_size=2)
    steps = {step: seen.instances(step).tolist() for step in range(1, 15)}
    assert seen.steps_per_epoch == 6, "so that these are more than two epochs"
    for instance in range(50):
        times = list(seen.find(np.array([instance]), last_step=14))
        assert times == [
            (step, batch.index(instance), instance)
            for step, batch in steps.items()
            if instance in batch
        ]


LENGTH, FILES, ROWS = 16, 3, 4000


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A run as OLMo publishes it: token files, the order of its first epoch, its config."""
    tokens = np.arange(FILES * ROWS * LENGTH, dtype=np.uint32) % 60_000
    for number, part in enumerate(np.split(tokens.astype(np.uint16), FILES)):
        part.tofile(tmp_path / f"part-{number}.npy")
    whole = order.global_indices(FILES * ROWS, 11)
    order.write_order(order.fit_to_world_size(whole, 8, True), tmp_path / "global_indices.npy")
    return tmp_path


def test_a_published_run_is_looked_into_by_url(published: Path, capsys):
    sent: list[int] = []
    with web_server(published, sent) as web:
        paths = [f"{web}/part-{number}.npy" for number in range(FILES)]
        cfg = config(32, True).update_with(data=DataConfig(paths=paths, drop_last=True))
        model = cfg.model.update_with(max_sequence_length=LENGTH)
        cfg.update_with(model=model).save(published / "config.yaml")
        indices = f"{web}/global_indices.npy"
        inspect(f"{web}/config.yaml", step=7, order=indices, world_size=8, json=True)
        config_bytes = (published / "config.yaml").stat().st_size
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    wanted = order.global_indices(FILES * ROWS, 11)[6 * 32 : 7 * 32]
    assert [line["index"] for line in lines] == wanted.tolist()
    assert [line["rank"] for line in lines] == [position % 8 for position in range(32)]
    for line in lines:
        first = line["index"] * LENGTH
        assert line["tokens"] == [(first + i) % 60_000 for i in range(LENGTH)]
        assert line["path"].endswith(f"part-{line['index'] // ROWS}.npy")
    # The config, the step's part of the order, and its instances: not a byte more.
    assert sum(sent) == config_bytes + 32 * 4 + 32 * LENGTH * 2


def test_a_run_of_ai2s_is_told_as_text(published: Path, monkeypatch, capsys):
    """By the hub's tokenizer: such a config names a file of OLMo's own package."""
    asked: list[str] = []

    def from_pretrained(name: str) -> Tokenizer:
        asked.append(name)
        return Tokenizer(WordLevel({f"w{i}": i for i in range(60_000)}, unk_token="w0"))

    monkeypatch.setattr("tokenizers.Tokenizer", SimpleNamespace(from_pretrained=from_pretrained))
    cfg = config(32, True)
    cfg.data.paths = [str(published / f"part-{number}.npy") for number in range(FILES)]
    cfg.model.max_sequence_length = LENGTH
    cfg.tokenizer.identifier = "tokenizers/allenai_dolma2.json"
    cfg.save(published / "config.yaml")
    inspect(str(published), step=7, order=str(published / "global_indices.npy"), json=True)
    assert asked == ["allenai/dolma2-tokenizer"]
    for line in map(json.loads, capsys.readouterr().out.splitlines()):
        assert line["text"] == " ".join(f"w{token}" for token in line["tokens"])


def test_a_run_that_there_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"found 'nothing' \(looked in nothing, checkpoints/"):
        inspect("nothing", 1)
    with pytest.raises(ValueError, match="expected one of --id, --url, --text, --file, --sha256"):
        (tmp_path / "run").mkdir()
        config(8, True).save(tmp_path / "run/config.yaml")
        seen("run")
