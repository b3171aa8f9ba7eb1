# Tokens: the tokenizer, and `dolma tokens` held still, counted and checked.


rule tokenizer:
    input:
        lambda w: plan.journal(w.dataset),
        documents=lambda w: (
            listings(w.dataset, "documents") if plan.trains_tokenizer(w.dataset) else []
        ),
    output:
        "data/{dataset}/tokenizer.json",
    log:
        "logs/tokenizer/{dataset}.log",
    params:
        recipe=lambda w: plan.flags(w.dataset, "tokenizer"),
    shell:
        "olmo tokenizer --documents {input.documents:q} --tokenizer {output:q} {params.recipe}"
        " --log {log:q}"


rule tokens:
    input:
        lambda w: plan.journal(w.dataset),
        documents="data/{dataset}/documents/{batch}.tsv",
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
        environment=lambda w, input: (
            f"--environment {input.environment}" if input.environment else ""
        ),
        eos=lambda w: plan.recipe(w.dataset).tokenizer.eos_token_id,
        pad=lambda w: plan.recipe(w.dataset).tokenizer.pad_token_id,
        recipe=lambda w: plan.flags(w.dataset, "tokens"),
    shell:
        "olmo tokens --documents {input.documents:q} --tokenizer {input.tokenizer:q}"
        " --requirements {input.requirements:q} {params.environment} --eos-token-id {params.eos}"
        " --pad-token-id {params.pad} {params.recipe} --listing {output:q} --log {log:q}"
