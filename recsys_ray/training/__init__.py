"""One training loop and a small task for each model."""
