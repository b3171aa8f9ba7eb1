# Deduplication and decontamination: digests of each file, compared by ranges of hashes; overlaps with
# evaluation sets by `dolma dedupe`, with one filter for all files; `dolma mix` removes what is marked.


def parts_of_duplicates(dataset):
    """The listings of `duplicates`, one for each range of hashes."""
    parts = range(plan.recipe(dataset).dedupe_parts)
    return [f"data/{dataset}/duplicates/{part:03}.tsv" for part in parts]


def finds_near(dataset):
    """Whether a recipe drops near duplicates."""
    dedupe = plan.recipe(dataset).dedupe
    return bool(dedupe and dedupe.near)


def tags_of_batch(wildcards):
    """The marks of documents that conditions on quality drop: they count as seen nowhere."""
    if not plan.recipe(wildcards.dataset).drops_quality:
        return []
    return f"data/{wildcards.dataset}/tags/{wildcards.batch}.tsv"


def digests_of_batch(wildcards):
    """The digests and overlaps of a batch, if the recipe removes them."""
    if not plan.recipe(wildcards.dataset).removes_overlaps:
        return []
    return f"data/{wildcards.dataset}/digests/{wildcards.batch}.tsv"


rule references:
    """What every file is compared with: held-out documents, and a filter of evaluation sets."""
    input:
        lambda w: damage.update_journal(w.dataset),
        documents=lambda w: listings(w.dataset, "documents"),
        against=lambda w: plan.decontamination_files(w.dataset),
        environment=dolma_environment,
        requirements="envs/dolma.txt",
    output:
        "data/{dataset}/references/all.tsv",
    log:
        "logs/references/{dataset}.log",
    conda:
        "../envs/dolma.yaml"
    params:
        environment=environment_flag,
        dedupe=lambda w: plan.section(w.dataset, "dedupe", "dedupe"),
        decontaminate=lambda w: plan.section(w.dataset, "decontaminate", "decontaminate"),
    shell:
        "olmo references --documents {input.documents:q} --against {input.against:q}"
        " --requirements {input.requirements:q} {params.environment} {params.dedupe}"
        " {params.decontaminate} --listing {output:q} --log {log:q}"


rule digests:
    """Digests of a batch's documents and lines, and their overlaps with evaluation sets."""
    input:
        lambda w: damage.update_journal(w.dataset),
        documents="data/{dataset}/documents/{batch}.tsv",
        references="data/{dataset}/references/all.tsv",
        tags=tags_of_batch,
        environment=dolma_environment,
        requirements="envs/dolma.txt",
    output:
        "data/{dataset}/digests/{batch}.tsv",
    log:
        "logs/digests/{dataset}/{batch}.log",
    conda:
        "../envs/dolma.yaml"
    params:
        environment=environment_flag,
        dedupe=lambda w: plan.section(w.dataset, "dedupe", "dedupe"),
        decontaminate=lambda w: plan.section(w.dataset, "decontaminate", "decontaminate"),
    shell:
        "olmo digests --documents {input.documents:q} --references {input.references:q}"
        " --tags {input.tags:q}"
        " --requirements {input.requirements:q} {params.environment} {params.dedupe}"
        " {params.decontaminate} --listing {output:q} --log {log:q}"


rule duplicates:
    """Documents and lines that occur earlier in the data set, in one range of hashes."""
    input:
        lambda w: damage.update_journal(w.dataset),
        digests=lambda w: listings(w.dataset, "digests"),
    output:
        "data/{dataset}/duplicates/{part}.tsv",
    log:
        "logs/duplicates/{dataset}/{part}.log",
    wildcard_constraints:
        part=r"\d+",
    params:
        parts=lambda w: plan.recipe(w.dataset).dedupe_parts,
    shell:
        "olmo duplicates --digests {input.digests:q} --part {wildcards.part} --parts {params.parts}"
        " --listing {output:q} --log {log:q}"


rule clusters:
    """Connect near duplicates, of which the first stays."""
    input:
        lambda w: damage.update_journal(w.dataset),
        duplicates=lambda w: parts_of_duplicates(w.dataset),
    output:
        "data/{dataset}/clusters/all.tsv",
    log:
        "logs/clusters/{dataset}.log",
    shell:
        "olmo clusters --duplicates {input.duplicates:q} --listing {output:q} --log {log:q}"


rule mixed:
    """Remove low quality, duplicates and overlaps from a batch's documents."""
    input:
        lambda w: damage.update_journal(w.dataset),
        documents="data/{dataset}/documents/{batch}.tsv",
        digests=digests_of_batch,
        tags=tags_of_batch,
        duplicates=lambda w: parts_of_duplicates(w.dataset),
        clusters=lambda w: f"data/{w.dataset}/clusters/all.tsv" if finds_near(w.dataset) else [],
        environment=dolma_environment,
        requirements="envs/dolma.txt",
    output:
        "data/{dataset}/mixed/{batch}.tsv",
    log:
        "logs/mixed/{dataset}/{batch}.log",
    conda:
        "../envs/dolma.yaml"
    params:
        environment=environment_flag,
        quality=lambda w: plan.section(w.dataset, "quality", "quality"),
    shell:
        "olmo mixed --documents {input.documents:q} --digests {input.digests:q} --tags {input.tags:q}"
        " --duplicates {input.duplicates:q} --clusters {input.clusters:q} --requirements {input.requirements:q}"
        " {params.environment} {params.quality} --listing {output:q} --log {log:q}"
