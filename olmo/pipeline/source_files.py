"""The source files of a data set: those its recipe names, and the flags of `olmo sources`."""

import json
import shlex
from fnmatch import fnmatchcase
from pathlib import Path

from olmo.config.strict import non_default_fields
from olmo.corpus import source_table
from olmo.corpus.source_table import Source, quote
from olmo.corpus.sources import GENERATED, SourcesSection
from olmo.pipeline.recipe import Recipe, recipe_path


def source_table_path(dataset: str, sources: SourcesSection) -> Path:
    """The table of a data set's sources: the recipe's, or one made from the published list."""
    return Path(sources.table or f"data/{dataset}/sources.tsv")


def find_sources(dataset: str, recipe: Recipe, is_tokenized: bool) -> list[Source]:
    """Every source file that a recipe names, in order. Errors: see Plan.sources.

    Args:
        is_tokenized: the files contain tokens, not documents.
    """
    sources = recipe.sources
    for name, kind in GENERATED.items():
        if count := getattr(sources, name):
            return [Source(f"{kind}-{i:02d}", f"{kind}:{i}/{count}") for i in range(count)]
    if is_tokenized:
        return source_table.assign_names([Source("", place) for place in sources.files])
    if sources.files:
        is_grouped = None if recipe.instructions else sources.rows.takes_whole_files
        return source_table.find_local_files(
            sources.files, recipe_path(dataset), is_grouped=is_grouped
        )
    table = source_table_path(dataset, sources)
    if not table.exists():
        if sources.table:
            raise ValueError(f"{recipe_path(dataset)}: sources.table: found no file {table}")
        raise ValueError(
            f"{dataset}: its list must be downloaded first: uv run snakemake --cores 2 {table}"
        )
    return source_table.read_stashing_secrets(table)


def check_weights(dataset: str, recipe: Recipe, sources: list[Source]) -> None:
    """Raises ValueError for a pattern in documents.weights that matches no source."""
    for weight in recipe.documents.weights:
        pattern = weight.partition("=")[0]
        if not any(fnmatchcase(source.name, pattern) for source in sources):
            names = [source.name for source in sources[:5]] + ["…"] * (len(sources) > 5)
            raise ValueError(
                f"{recipe_path(dataset)}: documents.weights: {pattern} matches no source; "
                f"they are {', '.join(names)}"
            )


def local_files(sources: list[Source]) -> list[str]:
    """The places of sources that are local files."""
    generated = tuple(f"{kind}:" for kind in GENERATED.values())
    places = [place for source in sources for place in source.parts or (source.place,)]
    files = [p for p in places if "://" not in p and not p.startswith(generated)]
    for file in files:
        if "{" in file or "}" in file:
            raise ValueError(f"{file}: snakemake reads braces as wildcards; rename the file")
    return files


def source_flags(dataset: str, recipe: Recipe, sources: list[Source]) -> str:
    """Sources as flags of `olmo sources`: name=place#mirror#…, and how to treat them.

    Sizes and digests are not among them, since they would change the command: it reads them from
    the table, and adds those that are missing.
    """
    section = recipe.sources
    words = ["--sources"]
    for source in sources:
        places = (source.place, *section.mirrors_of(source.place))
        words.append(f"{source.name}=" + "#".join(map(quote, places)))
    if section.table or section.url_list:
        words += ["--table", str(source_table_path(dataset, section))]
    words += ["--allow-missing"] * section.allow_missing
    words += ["--conversations"] * (recipe.instructions is not None)
    if any(source.parts for source in sources):
        words += ["--files", *section.files]
    if fields := non_default_fields(section.rows):
        words += ["--rows", json.dumps(fields)]
    return shlex.join(words)
