"""Training with the paper's settings: recipes, and the sequence tasks in Lightning."""
