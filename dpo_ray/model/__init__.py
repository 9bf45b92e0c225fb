"""The language model: its folder found or made, loaded as a policy, and run over pairs down to token log-probs.

The same forward pass trains, evaluates, scores the reference and calibrates vLLM. No loss enters. `cache`, `folders`,
`source`, `resolve`, `pin`, `tokenizer_files`, `libraries` and `version` can be imported without torch.
"""
