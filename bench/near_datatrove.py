"""datatrove's MinHash deduplication of a folder of JSON lines; bench/near.py runs it.

    PYTHON bench/near_datatrove.py IN OUT NGRAM BANDS ROWS

Needs `datatrove[io,processing]` and spacy in that Python. Prints the CPU seconds.
"""

import resource
import sys

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.hashing import HashConfig


def main() -> None:
    source, out, *numbers = sys.argv[1:]
    ngram, bands, rows = map(int, numbers)
    config = MinhashConfig(
        hash_config=HashConfig(precision=64),
        n_grams=ngram,
        num_buckets=bands,
        hashes_per_bucket=rows,
    )
    steps = [
        ([JsonlReader(source), MinhashDedupSignature(f"{out}/signatures", config)], 1),
        ([MinhashDedupBuckets(f"{out}/signatures", f"{out}/buckets", config=config)], bands),
        ([MinhashDedupCluster(f"{out}/buckets", f"{out}/removed", config=config)], 1),
        (
            [
                JsonlReader(source),
                MinhashDedupFilter(f"{out}/removed"),
                JsonlWriter(f"{out}/kept", compression=None),
            ],
            1,
        ),
    ]
    for number, (pipeline, tasks) in enumerate(steps):
        logs = f"{out}/logs-{number}"
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=logs).run()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(sum(one.ru_utime + one.ru_stime for one in (usage, children)))


if __name__ == "__main__":
    main()
