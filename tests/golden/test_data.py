"""The order of the data, the instances and the batches are OLMo's, exactly."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from olmo.config import DataConfig, InstanceFilterConfig, PaddingDirection, TrainConfig
from olmo.data import IterableDataset, order
from olmo.data.batches import build_train_dataloader
from olmo.data.collator import DataCollator
from olmo.data.memmap import MemMapDataset

GOLDEN = Path(__file__).parent / "data"
MEMMAP = GOLDEN / "memmap"
ORDERS = json.loads((GOLDEN / "indices/global_indices.json").read_text())
ITERATIONS = json.loads((GOLDEN / "indices/iteration_order.json").read_text())
ITEMS = json.loads((MEMMAP / "expected_items.json").read_text())
COLLATED = json.loads((MEMMAP / "collator.json").read_text())


@pytest.mark.parametrize("case", ORDERS, ids=lambda c: f"n{c['n']}-seed{c['seed']}")
def test_order(case: dict[str, Any]) -> None:
    shuffled = order.global_indices(case["n"], case["seed"], case["epoch"], case["shuffle"])
    fitted = order.fit_to_world_size(shuffled, case["world_size"], case["drop_last"])
    assert len(fitted) == case["length"] == case["total_size"]
    assert fitted[: len(case["first"])].tolist() == case["first"]
    assert hashlib.sha256(fitted.astype("<u4").tobytes()).hexdigest() == case["sha256_le_u32"]


class Numbers:
    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": torch.tensor([index])}


@pytest.mark.parametrize("case", ITERATIONS, ids=str)
def test_iteration(case: dict[str, Any]) -> None:
    names = ("seed", "epoch", "start_index", "max_examples", "drop_last", "world_size", "rank")
    dataset = IterableDataset(
        Numbers(case["n"]), case["global_batch_size"], **{k: case[k] for k in names}
    )
    loader: Any = torch.utils.data.DataLoader(
        dataset,
        batch_size=dataset.device_batch_size,
        drop_last=case["drop_last"],
        num_workers=case["num_workers"],
        collate_fn=DataCollator(PaddingDirection.right, 0),
    )
    assert [batch["index"].tolist() for batch in loader] == case["batches"]


def dataset(*names: str, **arguments: Any) -> MemMapDataset:
    arguments = {"chunk_size": 8, "include_instance_metadata": False, **arguments}
    return MemMapDataset(*[MEMMAP / name for name in names], **arguments)


A, B, SHORT = "a_u16.npy", "b_u16.npy", "c_short_u16.npy"
MASKS = [MEMMAP / "a_mask_bool.npy", MEMMAP / "b_mask_bool.npy"]
DATASETS = {
    "two_files_u16_chunk8": dataset(A, B, include_instance_metadata=True),
    "three_files_u16_chunk8_short_in_middle": dataset(
        A,
        SHORT,
        B,
        include_instance_metadata=True,
        metadata=[{"path": "a"}, {"path": "c"}, {"path": "b"}],
    ),
    "u32_chunk8": dataset("a_u32.npy", memmap_dtype=np.uint32, include_instance_metadata=True),
    "label_mask": dataset(A, B, label_mask_paths=MASKS),
    "attention_mask_pad1": dataset(A, B, generate_attention_mask=True, pad_token_id=1),
    "doc_lengths_eos7": dataset(A, B, generate_doc_lengths=True, eos_token_id=7),
}


def described(item: dict[str, Any]) -> dict[str, Any]:
    out = {}
    for name, value in item.items():
        out[name] = value.tolist() if torch.is_tensor(value) else value
        if torch.is_tensor(value):
            out[f"{name}__dtype"] = str(value.dtype)
    return out


@pytest.mark.parametrize("name", DATASETS)
def test_items(name: str) -> None:
    data, expected = DATASETS[name], ITEMS[name]
    assert len(data) == expected["len"]
    assert [list(pair) for pair in data.offsets] == expected["offsets"]
    assert [described(data[i]) for i in range(len(data))] == expected["items"]


def test_a_batch_is_its_items_collated() -> None:
    everything = dataset(
        A,
        B,
        label_mask_paths=MASKS,
        generate_attention_mask=True,
        pad_token_id=1,
        generate_doc_lengths=True,
        eos_token_id=7,
        instance_filter_config=InstanceFilterConfig(),
        include_instance_metadata=True,
        metadata={"x": [1]},
    )
    indices = [6, 0, 3, 1]
    collated = DataCollator(PaddingDirection.right, 1)([everything[i] for i in indices])
    batch = everything.batch(indices)
    assert batch.keys() == collated.keys()
    assert described(batch) == described(collated)


def test_instance_filter() -> None:
    data = dataset("rep_u16.npy", chunk_size=256, instance_filter_config=InstanceFilterConfig())
    expected = ITEMS["instance_filter_default"]
    assert [list(pair) for pair in data.offsets] == expected["offsets"]
    assert [{"instance_mask": item["instance_mask"]} for item in data] == expected["items"]


def test_negative_indices_and_sum() -> None:
    for index, ids in ITEMS["negative_index"].items():
        assert dataset(A, B)[int(index)]["input_ids"].tolist() == ids
    both = dataset(A) + dataset(B)
    assert len(both) == ITEMS["add"]["len"]
    assert all(
        torch.equal(x["input_ids"], y["input_ids"])
        for x, y in zip(both, dataset(A, B), strict=True)
    )


@pytest.mark.parametrize(
    "name, make",
    {
        "index_out_of_range": lambda: dataset(A, B)[8],
        "index_too_negative": lambda: dataset(A, B)[-9],
        "no_paths": lambda: dataset(),
        "attn_mask_no_pad": lambda: dataset(A, generate_attention_mask=True),
        "doc_len_no_eos": lambda: dataset(A, generate_doc_lengths=True),
        "mask_count": lambda: dataset(A, B, label_mask_paths=MASKS[:1]),
        "mask_size": lambda: len(dataset(A, label_mask_paths=MASKS[1:])),
        "metadata_count": lambda: dataset(A, B, metadata=[{}]),
    }.items(),
)
def test_errors(name: str, make: Any) -> None:
    kind, _, text = ITEMS["errors"][name].partition(": ")
    with pytest.raises((ValueError, IndexError)) as caught:
        make()
    said = str(caught.value).replace(f"{MEMMAP}/", "")
    assert (type(caught.value).__name__, said) == (kind, text)


@pytest.mark.parametrize("side", ["right", "left"])
def test_collator(side: str) -> None:
    one = {
        "input_ids": torch.tensor([3, 4, 5]),
        "attention_mask": torch.tensor([1, 1, 1]),
        "label_mask": torch.tensor([True, False, True]),
        "index": 9,
        "instance_mask": True,
        "doc_lens": torch.tensor([2, 1], dtype=torch.int32),
        "metadata": {"p": 1},
    }
    two = {
        "input_ids": torch.tensor([6, 7, 8, 9, 10]),
        "attention_mask": torch.tensor([1, 1, 1, 1, 0]),
        "label_mask": torch.tensor([True] * 5),
        "index": 2,
        "instance_mask": False,
        "doc_lens": torch.tensor([5], dtype=torch.int32),
        "metadata": {"p": 2},
    }
    out = DataCollator(PaddingDirection(side), 1)([one, two])
    assert described(out) == COLLATED[side]


def test_the_loader_gives_what_torchs_would(tmp_path: Path) -> None:
    """Every world size, start and tail: our loader, and torch's over OLMo's iterable dataset."""
    tokens = np.arange(21 * 8, dtype=np.uint16)
    tokens.tofile(tmp_path / "tokens.npy")
    for world_size, drop_last, start in [(1, False, 0), (2, True, 0), (2, False, 8), (4, True, 4)]:
        seen = []
        for rank in range(world_size):
            cfg = TrainConfig.new(
                save_folder=str(tmp_path / f"run{world_size}{drop_last}{start}"),
                save_overwrite=True,
                model={"max_sequence_length": 8, "pad_token_id": 1},
                global_train_batch_size=4,
                data=DataConfig(paths=[str(tmp_path / "tokens.npy")], drop_last=drop_last),
            )
            ours = build_train_dataloader(cfg, world_size=world_size, rank=rank, fs_local_rank=rank)
            ours.dataset.start_index = start
            olmos = IterableDataset(
                ours.dataset.dataset,
                4,
                seed=cfg.data_seed,
                start_index=start,
                drop_last=drop_last,
                world_size=world_size,
                rank=rank,
            )
            torchs = torch.utils.data.DataLoader(
                olmos, ours.batch_size, drop_last=drop_last, collate_fn=ours.collate_fn
            )
            expected = [(b["index"].tolist(), b["input_ids"].tolist()) for b in torchs]
            found = [(b["index"].tolist(), b["input_ids"].tolist()) for b in ours]
            assert found == expected and len(ours) == len(expected)
            seen.append(found)
        if world_size == 2:
            first = order.global_indices(21, 6198)[start : start + 4].tolist()
            assert [seen[0][0][0][0], seen[1][0][0][0], seen[0][0][0][1], seen[1][0][0][1]] == first


def test_the_inverse_says_where_each_instance_stands():
    shuffled = order.global_indices(1000, seed=7)
    assert np.array_equal(shuffled[order.invert_order(shuffled)], np.arange(1000))
