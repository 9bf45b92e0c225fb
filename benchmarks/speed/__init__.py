"""How fast a DPO step is, ours beside TRL's. Each row runs in a fresh process, the rows in turn, forwards and then
backwards; what is finished is not run again, so a killed run goes on.

    ours            dpo_ray.training.loop.train, micro-batches as dpo_ray.training.plan cuts them
    trl-default     activations recomputed in the backward pass, and a live reference model, as TRL's defaults are
    trl-fair        neither: activations kept, reference log-probs precomputed
    trl-tuned       trl-fair on pairs sorted by length, at the batch size that a short trial found fastest

Each row trains the same pairs after a warm-up that is not counted. trl-tuned warms up with pairs repeated, and its
batches larger than a step's pairs are steps of their own: fewer updates, in TRL's favour. Smaller ones are accumulated.
Ours is timed from one request for a step to the next, TRL's from on_step_begin to on_step_end, which leaves out its
loading and logging. A reference pass is timed apart, without loading the model.

In bfloat16 both sides train float32 weights. TRL 1.16 by default computes under autocast; its only faster choice,
weights in bfloat16, would train no float32 weights. Ours computes on a copy of the weights in bfloat16. Both use fused
AdamW.

The runs' folder:

    setting.json, model.json                what all parts share
    <data>/pairs.jsonl                      token ids, the first step's pairs first
    <data>/<dtype>/gemm.json                the machine's rate for the model's matrix products
    <data>/<dtype>/probe.json               tokens per second of TRL by batch size
    <data>/<dtype>/<row>.<repeat>.json      one run

Either trainer's packages are imported where they are used, for no environment has both.
"""
