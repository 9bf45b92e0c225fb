"""The only package that imports ray or vllm: sessions, shard workers, engines and the trainer."""
