"""The commands of `dpo-ray`, by what they are for. pipelines.cli has the list of them."""
