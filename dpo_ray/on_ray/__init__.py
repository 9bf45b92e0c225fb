"""The only part of dpo_ray that imports ray or vllm. It carries work to where it is done, and decides nothing."""
