"""Pages of docs/ that are made from the code: `make docs` writes them, tests/unit/docs/test_made.py compares them."""
