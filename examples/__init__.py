"""Data, models and the demo that the configs beside them use."""
