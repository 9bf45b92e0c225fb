"""The only part of dpo_ray that imports ray or vllm: sessions, scanning, shard workers, engines and the trainer."""
