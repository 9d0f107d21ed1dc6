"""What all figures share: one style, bar charts of bytes, and heat maps over the steps."""
