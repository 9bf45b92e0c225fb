"""Experiment trackers: TensorBoard, MLflow, Weights & Biases, each given one stream of metrics.

`fan` gives it to all of them from threads of their own; `tracker` is what each of them is asked for; `steps` brings the
metrics from the worker that trains. Their libraries are imported where they are asked for, and nowhere else.
"""
