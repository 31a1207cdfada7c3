"""Which backend computes a convolution: decided once for each pass."""
