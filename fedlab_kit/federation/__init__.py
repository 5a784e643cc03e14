"""Federated rounds: what one client does, what the server does, and the loop around them."""
