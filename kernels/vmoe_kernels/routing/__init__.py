"""From tokens to slots."""
