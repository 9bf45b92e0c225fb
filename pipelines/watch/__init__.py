"""dpo-ray watch: how a run stands, read from what is stored of it."""
