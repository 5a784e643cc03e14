"""Every figure in the README, measured side by side with its reference: `make bench`."""
