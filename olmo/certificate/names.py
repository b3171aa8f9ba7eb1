"""The names of a certificate's files; a croissant-<data set>.json for each data set, too."""

from __future__ import annotations

PROVENANCE, BUNDLE, BOM = "provenance.json", "provenance.sigstore.json", "bom.cdx.json"
CRATE, README, ROOT = "ro-crate-metadata.json", "README.md", "certificate.sig"
CROISSANT = "croissant-"


def signature_of(folder: str) -> str:
    """The name of the signature of a released folder: checkpoints/<run>/final, hf/<run>."""
    return "hf.sig" if folder.startswith("hf/") else "model.sig"
