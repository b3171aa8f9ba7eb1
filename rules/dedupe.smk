# Deduplication and decontamination: `dolma dedupe` marks duplicates and overlaps, for all files in one
# process; `dolma mix` removes them, in one job for each batch.


rule attributes:
    """Find duplicates, and overlaps with files of `decontaminate.against`."""
    input:
        lambda w: damage.update_journal(w.dataset),
        documents=lambda w: listings(w.dataset, "documents"),
        against=lambda w: plan.decontamination_files(w.dataset),
        environment=dolma_environment,
        requirements="envs/dolma.txt",
    output:
        "data/{dataset}/attributes/all.tsv",
    log:
        "logs/attributes/{dataset}.log",
    conda:
        "../envs/dolma.yaml"
    params:
        environment=environment_flag,
        dedupe=lambda w: plan.section(w.dataset, "dedupe", "dedupe"),
        decontaminate=lambda w: plan.section(w.dataset, "decontaminate", "decontaminate"),
    shell:
        "olmo attributes --documents {input.documents:q} --against {input.against:q}"
        " --requirements {input.requirements:q} {params.environment} {params.dedupe}"
        " {params.decontaminate} --listing {output:q} --log {log:q}"


rule mixed:
    """Remove what `attributes` found from a batch's documents."""
    input:
        lambda w: damage.update_journal(w.dataset),
        documents="data/{dataset}/documents/{batch}.tsv",
        attributes="data/{dataset}/attributes/all.tsv",
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
    shell:
        "olmo mixed --documents {input.documents:q} --attributes {input.attributes:q}"
        " --requirements {input.requirements:q} {params.environment} --listing {output:q} --log {log:q}"
