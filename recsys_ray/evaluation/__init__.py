"""Metrics, significance, reports: numbers that can be trusted."""
