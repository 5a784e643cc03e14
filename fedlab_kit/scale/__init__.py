"""The same experiment on Flower: many clients on one machine, or one process per client on many machines."""
