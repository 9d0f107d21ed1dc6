"""Roles of weights, recipes, and plans, which give every block its kinds."""
