"""OLMo's name for what a wrong config raises."""

OLMoConfigurationError = ValueError
