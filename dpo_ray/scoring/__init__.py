"""What gives completions their scores: each source is a Scorer, and their weighted sum is the reward. A source's code
or model enters the identity of its scores, so that another weight or pairing rule scores nothing anew."""
