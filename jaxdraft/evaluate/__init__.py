"""Measures drafts and writes the report."""
