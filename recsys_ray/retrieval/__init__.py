"""Catalogue -> vectors -> candidates."""
