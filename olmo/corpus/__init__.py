"""The stages from sources to token shards, and those for tokenizers and conversations."""
