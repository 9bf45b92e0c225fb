"""The search over training options."""
