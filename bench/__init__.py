"""Measurements of lora_kernels: `bench.device` for one GPU, `bench.cpu` for the library chain, `bench.report` for the tables."""
