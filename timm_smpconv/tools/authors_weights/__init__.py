"""The verified conversion of the authors' weights: leaves for weights/ of the checkout."""
