# Tokens: the tokenizer, and `dolma tokens`, made deterministic, counted and checked. A run without a
# data set uses the token files that its training config names.


ruleorder: given_tokens > tokens


rule given_tokens:
    """Get token files that were made elsewhere."""
    input:
        lambda w: damage.update_journal(w.dataset),
        lambda w: plan.local_files(w.dataset, w.batch),
    output:
        "data/{dataset}/tokens/{batch}.tsv",
    log:
        "logs/tokens/{dataset}/{batch}.log",
    wildcard_constraints:
        dataset=match_any(plan.tokenized_datasets),
    params:
        sources=lambda w: plan.source_flags(w.dataset, w.batch),
        dtype=lambda w: plan.train_config(w.dataset).data.memmap_dtype,
    shell:
        "olmo given-tokens --listing {output:q} {params.sources} --dtype {params.dtype} --log {log:q}"


rule tokenizer:
    """Train a data set's tokenizer, or take a given one."""
    input:
        lambda w: damage.update_journal(w.dataset),
        documents=lambda w: (
            listings(w.dataset, plan.documents_stage(w.dataset))
            if plan.trains_tokenizer(w.dataset)
            else []
        ),
        given=lambda w: plan.tokenizer_file(w.dataset),
    output:
        "data/{dataset}/tokenizer.json",
    log:
        "logs/tokenizer/{dataset}.log",
    params:
        recipe=lambda w: plan.section(w.dataset, "tokenizer"),
    shell:
        "olmo tokenizer --documents {input.documents:q} --tokenizer {output:q} {params.recipe}"
        " --log {log:q}"


rule tokens:
    """Token ids of a batch's documents."""
    input:
        lambda w: damage.update_journal(w.dataset),
        documents=lambda w: f"data/{w.dataset}/{plan.documents_stage(w.dataset)}/{w.batch}.tsv",
        tokenizer="data/{dataset}/tokenizer.json",
        environment=dolma_environment,
        requirements="envs/dolma.txt",
    output:
        "data/{dataset}/tokens/{batch}.tsv",
    log:
        "logs/tokens/{dataset}/{batch}.log",
    conda:
        "../envs/dolma.yaml"
    params:
        environment=environment_flag,
        eos=lambda w: plan.recipe(w.dataset).tokenizer.eos_token_id,
        pad=lambda w: plan.recipe(w.dataset).tokenizer.pad_token_id,
        recipe=lambda w: plan.section(w.dataset, "tokens"),
    shell:
        "olmo tokens --documents {input.documents:q} --tokenizer {input.tokenizer:q}"
        " --requirements {input.requirements:q} {params.environment} --eos-token-id {params.eos}"
        " --pad-token-id {params.pad} {params.recipe} --listing {output:q} --log {log:q}"
