"""`olmo hf`: export a finished run to a folder that transformers reads."""

import json
from pathlib import Path

from olmo.store.stage import Facts, Folder, Input, Unhashed, current_store, stage


def hf(checkpoint: Path, tokenizer: Path, folder: Path, name: str) -> None:
    """Write a final checkpoint as transformers' Olmo or Olmo2, with a model card called `name`.

    Args:
        name: of the model, in its card

    Raises ValueError for a model that neither class supports, with the keys.
    """
    huggingface_export(
        model=checkpoint / "model.safetensors",
        config=checkpoint / "config.yaml",
        tokenizer=tokenizer,
        folder=folder,
        name=name,
        checkpoint=checkpoint,
    )


@stage(version=1)
def huggingface_export(
    model: Input,
    config: Input,
    tokenizer: Input,
    folder: Folder,
    name: str,
    checkpoint: Unhashed[Path],
) -> Facts:
    """Weights, config, tokenizer and model card.

    `checkpoint` is the folder of `model` and `config`. The card describes its training, and is not
    in the output's digest.
    """
    from safetensors.torch import load_file

    from olmo.checkpoint import huggingface
    from olmo.report.card import card

    weights = load_file(model)
    folder.mkdir()
    huggingface.write_hf_folder(folder, weights, config.read_text(), tokenizer)
    settings = json.loads((folder / "config.json").read_text())
    parameters = sum(tensor.numel() for tensor in weights.values())
    text = card(name, settings, parameters, checkpoint, current_store())
    (folder / "README.md").write_text(text)
    return {
        "facts": {"architecture": settings["architectures"][0], "parameters": parameters},
        "not_in_content": ["README.md"],
    }
