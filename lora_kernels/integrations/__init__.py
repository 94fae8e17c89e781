"""Other people's layers on these kernels; each integration is imported by itself, and needs its own package."""
