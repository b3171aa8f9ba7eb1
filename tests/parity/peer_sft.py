"""Runs in the peer's environment: conversations to ids and labels, by OLMo's tokenizer and rule.

python peer_sft.py CASES.json RESULTS.npz

The script that prepares Tulu, scripts/prepare_tulu_data.py, is not in the released package. This
is its rule, written down with the package's own Tokenizer.
"""

import json
import sys

import numpy as np

from olmo.tokenizer import Tokenizer


def prepared(case, tokenizer):
    """(N, L) ids and labels of the examples that have a label."""
    length = case["length"]
    all_ids, all_labels = [], []
    for messages in case["conversations"]:
        ids, labels = [case["eos"]], [False]
        for message in messages:
            tokens = tokenizer.encode(f"<|{message['role']}|>\n", add_special_tokens=False)
            ids.extend(tokens)
            labels.extend(False for _ in tokens)
            if message["role"] == "assistant":
                text = message["content"].strip() + tokenizer.eos_token + "\n"
                tokens = tokenizer.encode(text, add_special_tokens=False)
                assert tokens[-2] == case["eos"]
                labels.extend(True for _ in tokens)
                labels[-1] = False
            else:
                text = message["content"].strip() + "\n"
                tokens = tokenizer.encode(text, add_special_tokens=False)
                labels.extend(False for _ in tokens)
            ids.extend(tokens)
        ids, labels = ids[:length], labels[:length]
        short = length - len(ids)
        ids, labels = ids + [case["pad"]] * short, labels + [False] * short
        if any(labels):
            all_ids.append(ids)
            all_labels.append(labels)
    shape = (len(all_ids), length)
    return np.array(all_ids, np.uint16).reshape(shape), np.array(all_labels, bool).reshape(shape)


if __name__ == "__main__":
    cases, results = sys.argv[1:]
    found = {}
    with open(cases) as file:
        given = json.load(file)
    for number, case in enumerate(given):
        tokenizer = Tokenizer.from_file(
            case["tokenizer"], eos_token_id=case["eos"], pad_token_id=case["pad"]
        )
        found[f"{number}/ids"], found[f"{number}/labels"] = prepared(case, tokenizer)
    np.savez(results, **found)
