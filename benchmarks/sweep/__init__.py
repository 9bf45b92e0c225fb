"""What a sweep over β and the learning rate costs, each side's way."""
