"""Which block gets which kinds: roles of weights, recipes, and plans."""
