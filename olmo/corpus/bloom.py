"""Filter files for `dolma dedupe`, made here so that their seeds and sizes are ours.

The toolkit draws the seeds of a new Bloom filter anew each time, and a false positive then falls
elsewhere. But it takes a filter from a file, whose head holds the seeds: magic, version, the
number of hashes (little-endian uint32 each), four uint64 a hash, the number of words (uint64); then
the words of 32 bits (allenai/dolma, src/bloom_filter.rs).
"""

import hashlib
import math
import struct
from pathlib import Path

MAGIC, VERSION = 0x81F0F117, 1


def dimensions(elements: int, false_positives: float) -> tuple[int, int]:
    """(words of 32 bits, hashes) of the smallest filter that keeps to a rate of false positives.

    Bloom's own formulas: 1.44 log2(1 / rate) bits an element, log2(1 / rate) hashes; at one in
    a million 3.6 bytes and 20.
    """
    bits = elements * -math.log(false_positives) / math.log(2) ** 2
    return max(1, math.ceil(bits / 32)), max(1, round(-math.log2(false_positives)))


def write(path: Path, elements: int, false_positives: float) -> None:
    """An empty filter, the same bytes each time. Its zeros take no disk until they are written."""
    words, hashes = dimensions(elements, false_positives)
    with path.open("wb") as file:
        file.write(struct.pack("<3I", MAGIC, VERSION, hashes))
        for number in range(hashes):  # four uint64, whatever they are
            file.write(hashlib.sha256(f"seeds of hash {number}".encode()).digest())
        file.write(struct.pack("<Q", words))
        file.truncate(file.tell() + 4 * words)
