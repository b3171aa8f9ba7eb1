"""Evaluation: perplexity, multiple-choice tasks, lm-eval. OLMo's path `olmo.eval`."""
