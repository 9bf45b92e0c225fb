"""Preference alignment of language models on a Ray cluster. The rooms, bottom up; each uses those above it, if any:

errors         what can go wrong, and the exit code of each
progress       lines for the person who watches
bins           items into groups: batches, first fit, spread over ranks
estimates      proportions and their intervals
histogram      samples as counts in a few bins
pairs          the rows that stages hand to each other, and their schemas
storage        paths and object stores, files of packages, artifacts with their manifests and shards; lineage, garbage
machine        what a machine has: packages, GPUs and their driver, disks, a clock
origin         where in whose code an error came about
rewards        rules that score completions
formats        how published preference data are written, and which of these ways a file is recognised as
config         the configuration: the sections, reading them, what is wrong with them
data           preference data as functions of rows, from bytes to token ids
losses         formulas, and what they are given
model          the model's folder, and its forward pass down to token log-probs
evaluation     margins, win rates, agreement of engines, the gate, the model card
report         the pages that tell people of a run, a sweep or rounds
tracking       experiment trackers, and the stream of metrics that they are given
scoring        what gives completions their scores, and models theirs on tasks, and what each source is known by
shards         what a stage does with one shard
training       the trainer: the plan of the steps, a step, the loop, checkpoints
on_ray         the only importer of ray and vllm: it carries, and decides nothing
api            all of it for Python programs, pipelines and tuning included; nothing here uses it
"""
