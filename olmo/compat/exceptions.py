"""OLMo's name for the error that a wrong config raises."""

OLMoConfigurationError = ValueError
