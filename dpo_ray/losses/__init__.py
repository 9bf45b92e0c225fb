"""What is minimised: pure functions of log-probs, no model, device or file.

Token log-probs become those of completions in pair_logps; formulas has the equations of the papers, objective applies
the one that the options name.
"""
