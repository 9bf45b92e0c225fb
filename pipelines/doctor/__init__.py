"""`dpo-ray doctor`: whether a configuration can run here, looked at before anything is computed."""
