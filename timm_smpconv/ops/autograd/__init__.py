"""The operators closed under differentiation: autograd functions and registered operators."""
