"""What is measured, how, and the results: each benchmark's tables stand beside it. Run from the root of a clone."""
