"""The order of a mixture: shares, which instances, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import run as train

from olmo.config import DataConfig, ModelConfig, TrainConfig
from olmo.corpus.mixture import MixturePart, check_parts, mixture_order
from olmo.data.batches import build_train_dataloader
from olmo.data.mixture import count_instances, draw, mix_instances, token_shares
from olmo.data.order import global_indices, invert_order, read_order, write_order

ARGUMENTS: dict[str, Any] = {
    "spans": [[100, 0], [40, 1], [60, 0]],
    "weights": ["a*=1", "b=3"],
    "instances": 1000,
    "seed": 1,
}


def build(folder: Path, **changes: Any) -> tuple[np.ndarray, Any]:
    """An order, and the facts of its record."""
    path = folder / "order.npy"
    facts = mixture_order.build(order=path, **{**ARGUMENTS, **changes})
    return np.array(read_order(path)), facts


def test_the_shares_are_those_that_were_asked_for(tmp_path: Path) -> None:
    order, facts = build(tmp_path)
    of_b = (order >= 100) & (order < 140)
    assert of_b.sum() == 750 and len(order) == 1000 == facts["instances"]
    first, second = facts["mixture"]
    assert (second["expected"], second["realised"]) == (0.75, 0.75)
    assert (second["instances"], second["available"], second["passes"]) == (750, 40, 18.75)
    assert (first["available"], first["passes"]) == (160, 250 / 160)


def test_the_shares_are_close_on_the_way(tmp_path: Path) -> None:
    order, _ = build(tmp_path)
    so_far = np.cumsum((order >= 100) & (order < 140))
    assert np.abs(so_far - 0.75 * np.arange(1, 1001)).max() < 2


@pytest.mark.parametrize("total", [1, 7, 8, 1920, 1921])
def test_no_count_is_off_by_one(total: int) -> None:
    shares = token_shares([0.1, 7, 3, 3], [1, 1, 1, 1])
    counts = count_instances(shares, total)
    assert counts.sum() == total and np.abs(counts - shares * total).max() < 1


def test_temperature() -> None:
    sizes = [100, 10_000]
    assert token_shares([1, 1], sizes, 1).tolist() == pytest.approx([1 / 101, 100 / 101])
    assert token_shares([2, 1], sizes, 1).tolist() == pytest.approx([2 / 102, 100 / 102])
    assert token_shares([1, 1], sizes, 1e9).tolist() == pytest.approx([0.5, 0.5])
    assert np.isfinite(token_shares([1, 1], [1, 10**12], 0.01)).all()


def test_the_least_used_instances_come_first() -> None:
    used = np.array([2, 0, 1, 0, 9])
    drawn = draw(np.array([0, 1, 2, 3]), 7, used, np.random.default_rng(0))
    assert sorted(drawn[:2]) == [1, 3] and sorted(drawn[2:5]) == [1, 2, 3]
    assert used.tolist() == [3, 2, 3, 2, 9] or used[:4].tolist() in ([2, 3, 3, 2], [2, 2, 3, 3])
    assert used[:4].sum() == 10 and used[4] == 9


def test_no_instance_is_used_twice_more_than_another(tmp_path: Path) -> None:
    order, _ = build(tmp_path)
    times = np.bincount(order, minlength=200)
    for group in (times[100:140], np.concatenate([times[:100], times[140:]])):
        assert group.max() - group.min() <= 1


def test_a_later_part_continues_the_order(tmp_path: Path) -> None:
    """It takes what the earlier ones left, and leaves their order as it is."""
    first, _ = build(tmp_path, instances=120)
    write_order(first, tmp_path / "first.npy")
    both, facts = build(
        tmp_path, instances=130, from_step=15, before=tmp_path / "first.npy", weights=["a=1", "b=0"]
    )
    assert np.array_equal(both[:120], first) and len(both) == 250
    of_a = both[(both < 100) | (both >= 140)]
    assert len(np.unique(of_a)) == 160  # 30 of them in the first part, and the other 130 here
    assert facts["from_step"] == 15 and facts["mixture"][1]["realised"] == 0


def test_seed_and_part_decide_the_order(tmp_path: Path) -> None:
    first, _ = build(tmp_path)
    assert np.array_equal(first, build(tmp_path)[0])
    assert not np.array_equal(first, build(tmp_path, seed=2)[0])
    assert not np.array_equal(first, build(tmp_path, from_step=1)[0])


def test_the_order_is_not_sorted() -> None:
    used = np.zeros(1000, int)
    order = mix_instances([np.arange(1000)], [1000], used, [1, 0])
    assert np.array_equal(np.sort(order), np.arange(1000))
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1


def test_a_pattern_without_an_instance(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"an instance for b=3, found none.*weight 0"):
        build(tmp_path, spans=[[100, 0], [0, 1]])
    assert build(tmp_path, spans=[[100, 0], [0, 1]], weights=["a*=1", "b=0"])[0].max() < 100


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({}, "a weight above 0, found none; add"),
        ({"weights": ["a"]}, "pattern=number.*found 'a'"),
        ({"weights": ["=1"]}, "pattern=number"),
        ({"weights": ["a=-1"]}, "0 or above"),
        ({"weights": ["a=nan"]}, "0 or above"),
        ({"weights": ["a=inf"]}, "0 or above"),
        ({"weights": ["a=1", "a=2"]}, "expected a once, found it twice"),
        ({"weights": ["a=0"]}, "above 0, found none"),
        ({"weights": ["a=1"], "temperature": 0}, "temperature: expected a number above 0"),
        ({"weights": ["a=1"], "temperature": float("nan")}, "temperature"),
        ({"weights": ["a=1"], "from_step": -1}, "from_step"),
        ({"weights": ["a=1"], "weight": 1}, "weight"),
    ],
)
def test_bad_parts(part: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixturePart.new(**part)


def test_groups() -> None:
    part = MixturePart(weights=["a*=1", "*=2"])
    assert part.find_groups(["ab", "c", "a"]) == [0, 1, 0]
    with pytest.raises(ValueError, match=r"found none for c; add \*=1, or \*=0"):
        MixturePart(weights=["a*=1"]).find_groups(["ab", "c"])
    with pytest.raises(ValueError, match="b matches no source"):
        MixturePart(weights=["a*=1", "b=1"]).find_groups(["ab"])


@pytest.mark.parametrize("begins", [[1], [0, 0], [0, 20, 10], [0, 24], [0, 30]])
def test_parts_that_a_run_does_not_reach(begins: list[int]) -> None:
    parts = [MixturePart(from_step=step, weights=["*=1"]) for step in begins]
    with pytest.raises(ValueError, match="from_step 0, and then rising steps below 24"):
        check_parts(parts, 24)


def test_a_mixture_has_no_epochs() -> None:
    with pytest.raises(ValueError, match="max_duration in steps or tokens"):
        check_parts([MixturePart(weights=["*=1"])], None)


@pytest.mark.parametrize("order", [[0, 0, 1], [0, 3, 1]])
def test_positions_of_a_mixture(order: list[int]) -> None:
    with pytest.raises(ValueError, match="each instance once, found a mixture's"):
        invert_order(np.array(order, np.uint32))
    assert invert_order(global_indices(3, 1))[global_indices(3, 1)].tolist() == [0, 1, 2]


def config(folder: Path, order: list[int] | None, **data: Any) -> TrainConfig:
    np.arange(64, dtype=np.uint16).tofile(folder / "tokens.npy")
    if order is not None:
        write_order(np.array(order), folder / "order.npy")
        data["order_path"] = str(folder / "order.npy")
    return TrainConfig(
        model=ModelConfig(max_sequence_length=8),
        data=DataConfig(paths=[str(folder / "tokens.npy")], mixture=True, **data),
        global_train_batch_size=2,
        save_folder=str(folder / "run"),
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_loader_reads_a_mixture(world_size: int, tmp_path: Path) -> None:
    order = [7, 0, 7, 7, 1, 7, 2, 2, 0, 1, 0, 3]  # more than there are, not all of them
    cfg = config(tmp_path, order)
    loaders = [
        build_train_dataloader(cfg, world_size=world_size, rank=r) for r in range(world_size)
    ]
    shares = [[batch["index"].tolist() for batch in loader] for loader in loaders]
    batches = zip(*shares, strict=True)
    read = [index for batch in batches for indices in zip(*batch, strict=True) for index in indices]
    assert read == order
    loader = loaders[0]
    assert loader.dataset.total_size == 12
    with pytest.raises(ValueError, match="the whole run, found 12, since a mixture has no second"):
        loader.dataset.reshuffle(1)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([0, 8], r"below 8, as many as the token files have, found 8; the order belongs to other"),
        ([], "expected the instances of the whole run, found 0"),
        (None, r"expected its order in data.order_path, found none"),
    ],
)
def test_a_mixture_of_other_data(order: list[int] | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        build_train_dataloader(config(tmp_path, order))


def test_a_run_that_is_longer_than_its_mixture(tmp_path: Path) -> None:
    """It fails before the first step; of the right length it ends with the order."""
    write_order(np.arange(72) % 5, tmp_path / "order.npy")
    data = {"order_path": str(tmp_path / "order.npy"), "mixture": True}
    with pytest.raises(ValueError, match="expected 10 more steps of 8 instances, found 9, since"):
        train(tmp_path, data=data)
    assert not (tmp_path / "run/metrics.jsonl").exists()
    assert train(tmp_path, data=data, max_duration=9, save_overwrite=True) == 0


def test_more_instances_than_an_order_can_name(tmp_path: Path) -> None:
    """They would wrap around in uint32; refused before memory is used."""
    with pytest.raises(ValueError, match="has at most 4294967294 instances, not 5000000000"):
        build(tmp_path, spans=[[2_500_000_000, 0], [2_500_000_000, 1]])
    with pytest.raises(ValueError, match="bytes of memory"):
        build(tmp_path, spans=[[4_000_000_000, 0], [40, 1]])
