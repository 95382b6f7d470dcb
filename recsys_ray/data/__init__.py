"""From sources to clean tables and training tables."""
