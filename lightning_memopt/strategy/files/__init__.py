"""A checkpoint on the disk: files that appear whole, are checked when they are read, and are never trusted."""
