"""Device code: three matmul bodies (`shrink`, `expand`, `wgrad`) and the plugs they share. Triton only, no torch."""
