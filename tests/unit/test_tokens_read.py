"""Token files that training would trip over are refused before it starts."""

import http.server
from pathlib import Path

import numpy as np
import pytest
from servers import serving

from olmo.config import DataConfig, TrainConfig
from olmo.data import order
from olmo.data.batches import build_train_dataloader
from olmo.data.checks import check_token_files
from olmo.data.memmap import MemMapDataset


def tokens(path: Path, values: np.ndarray) -> Path:
    values.tofile(path)
    return path


def test_ids_beyond_the_vocabulary(tmp_path: Path) -> None:
    path = tokens(tmp_path / "t.npy", np.array([1, 2, 300, 4] * 8, np.uint16))
    assert check_token_files(MemMapDataset(path, chunk_size=4), 301) == 32
    with pytest.raises(ValueError, match=r"token 2 of .*t.npy is 300 .* has 300 embeddings"):
        check_token_files(MemMapDataset(path, chunk_size=4), 300)


def test_wider_numbers_read_as_narrow_ones(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(5, 90_000, 1000).astype(np.uint32)
    path = tokens(tmp_path / "t.npy", ids)
    with pytest.raises(ValueError, match=r"looks like uint32.*memmap_dtype=uint32"):
        check_token_files(MemMapDataset(path, chunk_size=4), 100_000)
    check_token_files(MemMapDataset(path, chunk_size=4, memmap_dtype=np.uint32), 100_000)


def test_padding_is_not_taken_for_wider_numbers(tmp_path: Path) -> None:
    path = tokens(tmp_path / "t.npy", np.ones(1000, np.uint16))
    check_token_files(MemMapDataset(path, chunk_size=4), 10)


def test_label_masks_of_another_length(tmp_path: Path) -> None:
    path = tokens(tmp_path / "t.npy", np.ones(10, np.uint16))
    mask = tokens(tmp_path / "m.npy", np.ones(9, np.bool_))
    for chunk_size in (4, 10):  # the same number of instances, and another
        dataset = MemMapDataset(path, chunk_size=chunk_size, label_mask_paths=[mask])
        with pytest.raises(ValueError, match=r"each of 10 tokens, found 9 in .*m\.npy"):
            check_token_files(dataset, 10)


def test_missing_short_and_odd_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"evaluators\.x\.data: no token file"):
        check_token_files(MemMapDataset(tmp_path / "no.npy"), 10, "evaluators.x.data")
    short = tokens(tmp_path / "short.npy", np.ones(3, np.uint16))
    empty = tokens(tmp_path / "empty.npy", np.ones(0, np.uint16))
    with pytest.raises(ValueError, match="3 tokens in 2 files give no instance of 4"):
        check_token_files(MemMapDataset(short, empty, chunk_size=4), 10)
    (tmp_path / "odd.npy").write_bytes(b"123")
    with pytest.raises(ValueError, match="3 bytes, not a whole number of uint16"):
        check_token_files(MemMapDataset(tmp_path / "odd.npy", chunk_size=1), 10)


def test_an_empty_file_among_others_gives_nothing(tmp_path: Path) -> None:
    empty = tokens(tmp_path / "empty.npy", np.ones(0, np.uint16))
    full = tokens(tmp_path / "full.npy", np.arange(8, dtype=np.uint16))
    data = MemMapDataset(empty, full, empty, chunk_size=4)
    assert [x["input_ids"].tolist() for x in data] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    check_token_files(data, 8)


def config(folder: Path, **data: object) -> TrainConfig:
    return TrainConfig.new(
        save_folder=str(folder / "run"),
        model={"max_sequence_length": 4},
        global_train_batch_size=2,
        data={"paths": [str(folder / "t.npy")], **data},
    )


def test_a_stored_order_is_followed_and_copied(tmp_path: Path) -> None:
    tokens(tmp_path / "t.npy", np.arange(20, dtype=np.uint16))
    order.write_order(np.array([4, 0, 3, 1, 2]), tmp_path / "order.npy")
    cfg = config(tmp_path, order_path=str(tmp_path / "order.npy"))
    loader = build_train_dataloader(cfg)
    assert [b["index"].tolist() for b in loader] == [[4, 0], [3, 1], [2]]
    copy = tmp_path / "run/train_data/global_indices.npy"
    np.memmap(copy, mode="r+", dtype=np.uint32)[:] = 0
    assert order.read_order(tmp_path / "order.npy", 5).tolist() == [4, 0, 3, 1, 2], (
        "a copy, not a link"
    )
    loader.dataset.reshuffle(1)
    assert loader.dataset.get_global_indices().tolist() == order.global_indices(5, 6198, 1).tolist()


def test_an_order_of_other_data_is_refused(tmp_path: Path) -> None:
    tokens(tmp_path / "t.npy", np.arange(20, dtype=np.uint16))
    order.write_order(np.arange(6), tmp_path / "order.npy")
    with pytest.raises(ValueError, match="expected 5 uint32 numbers, found 24 bytes"):
        build_train_dataloader(config(tmp_path, order_path=str(tmp_path / "order.npy")))


def test_a_folder_with_a_run_is_not_written_over(tmp_path: Path) -> None:
    tokens(tmp_path / "t.npy", np.arange(20, dtype=np.uint16))
    build_train_dataloader(config(tmp_path))
    with pytest.raises(ValueError, match="already contains a run"):
        build_train_dataloader(config(tmp_path))
    build_train_dataloader(config(tmp_path).update_with(save_overwrite=True))


def test_reading_errors_reach_the_one_who_waits(tmp_path: Path) -> None:
    tokens(tmp_path / "t.npy", np.arange(20, dtype=np.uint16))
    loader = build_train_dataloader(config(tmp_path))
    (tmp_path / "t.npy").unlink()
    with pytest.raises(FileNotFoundError):
        next(iter(loader))


def test_paths_or_datasets(tmp_path: Path) -> None:
    from olmo.data import build_memmap_dataset

    for name in "ab":
        tokens(tmp_path / name, np.full(4, ord(name), np.uint16))
    cfg = TrainConfig.new(model={"max_sequence_length": 4})
    by_label = {"z": [str(tmp_path / "a")], "c": [str(tmp_path / "b")]}
    data = build_memmap_dataset(cfg, DataConfig(datasets=by_label))
    assert [x["metadata"] for x in data] == [{"label": "c"}, {"label": "z"}]
    for wrong, said in (
        (DataConfig(), r"found neither; set --data\.paths=\[tokens\.npy\],"),
        (DataConfig(paths=["x"], datasets=by_label), "expected one of them, found both"),
    ):
        with pytest.raises(ValueError, match=said):
            build_memmap_dataset(cfg, wrong)


class Ranges(http.server.BaseHTTPRequestHandler):
    """Serves the file `t.npy` of its folder whole or by ranges, after one stumble."""

    folder: Path
    stumbled = False

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.path != "/t.npy":
            return self.answer(404, b"")
        body = (self.folder / "t.npy").read_bytes()
        if span := self.headers.get("Range"):
            if not Ranges.stumbled:
                Ranges.stumbled = True
                return self.answer(503, b"")
            first, last = map(int, span.removeprefix("bytes=").split("-"))
            return self.answer(206, body[first : last + 1])
        return self.answer(200, body)

    def log_message(self, *args: object) -> None:
        pass


def test_token_files_by_url(tmp_path: Path) -> None:
    path = tokens(tmp_path / "t.npy", np.arange(22, dtype=np.uint16))
    Ranges.folder, Ranges.stumbled = tmp_path, False
    with serving(Ranges) as url:
        there, here = (MemMapDataset(p, chunk_size=4) for p in (f"{url}/t.npy", path))
        assert there.offsets == here.offsets
        assert there.batch([4, 0, 3])["input_ids"].tolist() == [
            here[i]["input_ids"].tolist() for i in (4, 0, 3)
        ]
        assert check_token_files(there, 22) == 22
        with pytest.raises(ValueError, match="has 20 embeddings"):
            check_token_files(there, 20)
        with pytest.raises(FileNotFoundError, match=r"data: no token file at .*/no\.npy"):
            check_token_files(MemMapDataset(f"{url}/no.npy"), 10)
