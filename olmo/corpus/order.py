"""The order in which a run sees its instances, and the inverse of it, as stages."""

from contextlib import suppress
from pathlib import Path

from olmo.corpus.listing import read_listing
from olmo.corpus.mixture import MixturePart, build_mixture_order
from olmo.data.files import token_itemsize
from olmo.data.order import global_indices, invert_order, read_order, write_order
from olmo.store.stage import Facts, Input, Output, stage


def order(
    tokens: list[Path],
    order: Path,
    sequence_length: int,
    seed: int,
    dtype: str = "uint16",
    epoch: int = 0,
    batch_size: int = 1,
    mixture: MixturePart | None = None,
    steps: int = 0,
    before: Path | None = None,
    one_epoch: int = 0,
) -> None:
    """Shuffle the instances that a run sees; the order depends on their number alone.

    `epoch` is the one in which the run begins; the trainer computes the orders of later epochs.
    Of a run with a mixture, the order of the steps up to the end of one part.

    Args:
        order: file to write
        sequence_length: tokens of an instance
        epoch: the one in which the run begins
        batch_size: instances of a batch, of which there must be one
        mixture: the part of the run's mixture
        steps: of that part
        before: the order up to that part
        one_epoch: steps of a ladder's longest run, which must all be in the first epoch

    Raises ValueError if they are fewer than a batch, or the held-out documents fill none.
    """
    width = token_itemsize(dtype)

    def count(output: str) -> tuple[int, int]:
        sizes = [entry.bytes // width for entry in read_listing(tokens, output)]
        return sum(size // sequence_length for size in sizes), sum(sizes)

    instances, available = count("tokens")
    if instances < batch_size:
        raise ValueError(
            f"expected at least {batch_size} instances of {sequence_length} tokens, a batch; found "
            f"{instances} in {available:,} tokens, of which each shard fills its own; use more "
            "documents (a smaller documents.keep_one_in), a smaller model.max_sequence_length or a "
            "smaller global_train_batch_size"
        )
    if one_epoch * batch_size > instances:
        raise ValueError(
            f"expected {one_epoch * batch_size:,} instances of {sequence_length} tokens for the "
            f"{one_epoch:,} steps of the ladder's longest run, since a second epoch teaches less "
            f"than the first; found {instances:,}; use more documents (a smaller "
            "documents.keep_one_in), or smaller budgets"
        )
    heldout, available = count("heldout-tokens")
    if available and not heldout:
        raise ValueError(
            f"expected a held-out instance of {sequence_length} tokens, found {available:,} tokens "
            "held out, of which each shard fills its own; set a larger documents.heldout_share, or "
            "0 for none"
        )
    if mixture is None:
        global_order(order=order, instances=instances, seed=seed, epoch=epoch)
    else:
        shards = read_listing(tokens, "tokens")
        counts = [shard.bytes // width // sequence_length for shard in shards]
        build_mixture_order(mixture, shards, counts, order, seed, steps * batch_size, before)
    # OLMo's README maps it with mode="r+", though it only reads it, so its owner may write. The
    # store notices a written object by its time and checks it on the next use.
    with suppress(PermissionError):  # another user owns it
        order.chmod(0o644)


@stage(version=1)
def global_order(order: Output, instances: int, seed: int, epoch: int = 0) -> Facts:
    """Write global_indices.npy of one epoch, before anything that depends on the world size."""
    write_order(global_indices(instances, seed, epoch), order)
    return {"instances": instances}


@stage(version=1)
def positions(order: Input, positions: Output) -> Facts:
    """Write the inverse of an order: each instance's position, raw uint32 like the order.

    Args:
        positions: file to write
    """
    found = invert_order(read_order(order))
    write_order(found, positions)
    return {"instances": len(found)}
