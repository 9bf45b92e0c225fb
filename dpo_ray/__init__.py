"""Preference alignment of language models on a Ray cluster."""
