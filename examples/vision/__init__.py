"""Image classification with a Vision Transformer, on images that are made or read from a folder."""
