"""Bloom filter files for `dolma dedupe`, written here to fix their seeds and sizes.

The toolkit draws new random seeds for each filter, which moves the false positives. But it can load
a filter from a file, and its header contains the seeds: magic, version, the number of hashes
(little-endian uint32 each), four uint64 a hash, the number of words (uint64); then the words of 32
bits (allenai/dolma, src/bloom_filter.rs).
"""

import hashlib
import math
import struct
from pathlib import Path

MAGIC, VERSION = 0x81F0F117, 1


def filter_dimensions(elements: int, false_positives: float) -> tuple[int, int]:
    """(words of 32 bits, hashes) of the smallest filter with this rate of false positives.

    Bloom's own formulas: 1.44 log2(1 / rate) bits an element, log2(1 / rate) hashes; at one in
    a million 3.6 bytes and 20.
    """
    bits = elements * -math.log(false_positives) / math.log(2) ** 2
    return max(1, math.ceil(bits / 32)), max(1, round(-math.log2(false_positives)))


def filter_bytes(elements: int, false_positives: float) -> int:
    """The size of a filter's words in memory, without its header."""
    return 4 * filter_dimensions(elements, false_positives)[0]


def write_filter(path: Path, elements: int, false_positives: float) -> None:
    """Write an empty filter, a sparse file with the same bytes each time."""
    words, hashes = filter_dimensions(elements, false_positives)
    with path.open("wb") as file:
        file.write(struct.pack("<3I", MAGIC, VERSION, hashes))
        for number in range(hashes):  # four uint64 of seeds
            file.write(hashlib.sha256(f"seeds of hash {number}".encode()).digest())
        file.write(struct.pack("<Q", words))
        file.truncate(file.tell() + 4 * words)
