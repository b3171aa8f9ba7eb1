"""Where processes run: torchrun, SLURM, several nodes."""
