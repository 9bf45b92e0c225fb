"""What preference data are taken for, and a few rows as the model will see them, before anything runs."""
