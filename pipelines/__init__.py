"""The stages, the main job and the command line."""
