"""The pages of the documentation; `make/` has what makes some of them, and the site."""
