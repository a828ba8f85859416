"""The experts' MLPs."""
