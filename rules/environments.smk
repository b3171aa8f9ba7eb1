# Separate virtual environments: dolma needs numpy<2 and tokenizers 0.19.


rule environment:
    """Build the environment of the toolkit `dolma`."""
    input:
        "envs/{name}.txt",
    output:  # not removed before it is made again: another project may read it
        update("environments/{name}.json"),
    log:
        "logs/environment/{name}.log",
    shell:
        "olmo environment --requirements {input:q} --environment {output:q} --log {log:q}"


def dolma_environment(wildcards):
    """Our environment, unless `--sdm conda` activates one with the same versions for the job."""
    return [] if workflow.deployment_settings.deployment_method else ["environments/dolma.json"]


def environment_flag(wildcards, input):
    return f"--environment {input.environment}" if input.environment else ""
