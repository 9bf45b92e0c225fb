"""Configurations of other trainers → ours, with what became of each of their options."""
