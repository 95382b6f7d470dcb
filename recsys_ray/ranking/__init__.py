"""Candidates -> ordered results: recommenders, features, rankers."""
