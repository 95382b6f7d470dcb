"""Networks and their loaders; no Ray and no training code."""
