"""Pruning, quantization and distillation as pure functions on tensors and modules: no round, no file."""
