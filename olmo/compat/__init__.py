"""Import paths of OLMo for what lives elsewhere here; nothing of ours imports them."""
