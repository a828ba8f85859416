"""Whole models and the loop that trains them."""
