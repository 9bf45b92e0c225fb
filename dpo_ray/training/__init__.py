"""Training a policy, without Ray: the plan of the steps, one step, the loop over them, and its checkpoints.

Whoever runs the loop puts in where steps come from and where checkpoints go. `plan` and `batch` can be imported without
torch, for those who only carry the rows of a step to the trainer.
"""
