"""Training below 16 bits."""
