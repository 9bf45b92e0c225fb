"""What a stage does with one shard: where its rows are goes in, a table and its counters come out.

One file a stage, with what makes it another shard beside it. No Ray: it carries these workers and knows nothing of what
they do. They start without torch, unless they score.
"""
