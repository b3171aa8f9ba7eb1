# Export of a final checkpoint for transformers, with tokenizer and model card.


rule hf:
    """A run for transformers: hf/<run>."""
    input:
        final="checkpoints/{run}/final",
        tokenizer=lambda w: f"data/{plan.dataset(w.run)}/tokenizer.json",
    output:
        directory("hf/{run}"),
    log:
        "logs/hf/{run}.log",
    shell:
        "olmo hf --checkpoint {input.final:q} --tokenizer {input.tokenizer:q} --folder {output:q}"
        " --name {wildcards.run:q} --log {log:q}"
