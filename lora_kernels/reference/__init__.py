"""Plain PyTorch for every op: the oracle of the tests, the fallback of every device, the baseline of the benchmarks."""
