"""Load a state dict: match names, check values, infer kinds, and report what has changed."""
