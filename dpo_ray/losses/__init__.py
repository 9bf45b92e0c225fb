"""What is minimised: pure functions of log-probs, each under the equation of its paper. No model, device or file."""
