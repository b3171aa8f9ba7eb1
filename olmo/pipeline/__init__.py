"""What snakemake is to make of config/config.yaml, and the stages from training on."""
