"""Running on a cluster that exists elsewhere."""
