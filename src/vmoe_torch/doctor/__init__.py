"""`vmoe doctor`: whether this package computes what it should on this machine, how fast, and what to do if not."""
