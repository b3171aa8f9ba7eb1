"""The order in which a run sees its instances, and its inverse, as stages."""

from contextlib import suppress
from pathlib import Path

from olmo.corpus.listing import read
from olmo.data.files import bytes_per_token
from olmo.data.order import global_indices, invert_order, read_order, write_order
from olmo.store.stage import Facts, Input, Output, stage


def order(
    tokens: list[Path],
    order: Path,
    sequence_length: int,
    seed: int,
    dtype: str = "uint16",
    epoch: int = 0,
) -> None:
    """The order in which a run sees its instances: a shuffle that depends on their number.

    `epoch` is that in which the run begins; the trainer makes the orders of later ones.
    """
    width = bytes_per_token(dtype)
    sizes = [entry.bytes for entry in read(tokens, "tokens")]
    instances = sum(size // (width * sequence_length) for size in sizes)
    if instances == 0:
        raise ValueError(
            f"expected at least one instance of {sequence_length} tokens, found {sum(sizes)} "
            f"bytes in {len(sizes)} shards, none as long as that; give more documents (a smaller "
            "documents.keep_one_in), or a smaller model.max_sequence_length"
        )
    global_order(order=order, instances=instances, seed=seed, epoch=epoch)
    # OLMo's README maps it with mode="r+", which reads it only. Its owner may; should anything be
    # written into it, its time is no more the store's, and what is wrong with it is found on use.
    with suppress(PermissionError):  # another user's
        order.chmod(0o644)


@stage(version=1)
def global_order(order: Output, instances: int, seed: int, epoch: int = 0) -> Facts:
    """global_indices.npy of one epoch, without what depends on the world size."""
    write_order(global_indices(instances, seed, epoch), order)
    return {"instances": instances}


@stage(version=1)
def positions(order: Input, positions: Output) -> Facts:
    """The inverse of an order: for each instance its position, raw uint32, as the order is."""
    found = invert_order(read_order(order))
    write_order(found, positions)
    return {"instances": len(found)}
