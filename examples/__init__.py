"""Data, models and the demo for the configs in this folder."""
