"""`dpo-ray plan`: what a run will take, counted before it begins: rows, tokens, memory, time, cost."""
