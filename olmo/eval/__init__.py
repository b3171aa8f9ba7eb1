"""What a model is worth: perplexity, tasks, choices. OLMo's path `olmo.eval`."""
