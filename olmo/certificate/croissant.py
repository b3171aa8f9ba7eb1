"""Croissant metadata of a data set: its files with their sha256, and its licences.

Plain JSON, since mlcroissant brings 27 packages. In the tests it validates the result.

Source: https://docs.mlcommons.org/croissant/docs/croissant-spec.html
"""

from __future__ import annotations

from typing import Any

from olmo.certificate.history import Source

VERSION = "http://mlcommons.org/croissant/1.0"
TERMS = """citeAs column conformsTo=dct:conformsTo equivalentProperty extract field fileProperty
fileObject fileSet format includes isLiveDataset jsonPath key md5 parentField path recordSet
references regex repeated replace samplingRate separator source subField transform"""
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "sc": "https://schema.org/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{name: place or f"cr:{name}" for name, _, place in (t.partition("=") for t in TERMS.split())},
}


def state_dataset(
    name: str, sources: list[Source], published: str, publisher: str | None
) -> dict[str, Any]:
    """The metadata of one data set; `published`: when its files were there, in ISO 8601."""
    licences = sorted({source.licence for source in sources})
    urls = sorted({source.url.rpartition("/")[0] for source in sources if source.url})
    # Croissant wants a page of the data set; without one, what names its content.
    place = f"{urls[0]}/" if urls else f"urn:sha256:{sources[0].sha256}"
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": VERSION,
        "name": name,
        "description": f"The {len(sources):,} source files of the data set {name}.",
        "license": licences,
        "url": place,
        "datePublished": published,
        "version": "1.0.0",
        "citeAs": f"{name}, {place}",
        **({"publisher": {"@type": "Organization", "name": publisher}} if publisher else {}),
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": f"file-{number}",
                "name": source.name,
                "description": f"{source.origin or source.url}; licence: {source.licence}",
                "contentUrl": source.url or source.name,
                "encodingFormat": find_format(source.url or source.name),
                "sha256": source.sha256,
                **({"contentSize": f"{source.size} B"} if source.size is not None else {}),
            }
            for number, source in enumerate(sources)
        ],
    }


def find_format(name: str) -> str:
    """The media type of a file, by its name."""
    formats = {
        ".gz": "application/gzip",
        ".zst": "application/zstd",
        ".parquet": "application/vnd.apache.parquet",
        ".jsonl": "application/jsonlines",
        ".json": "application/json",
        ".csv": "text/csv",
        ".tsv": "text/tab-separated-values",
        ".txt": "text/plain",
    }
    path = name.partition("?")[0]
    return next(
        (kind for end, kind in formats.items() if path.endswith(end)), "application/octet-stream"
    )
