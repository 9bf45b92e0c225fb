"""A first configuration for somebody's data, model and machine, each value with why it is so."""
