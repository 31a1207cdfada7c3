"""Programs for people: the command line and what it runs. Nothing else in the package imports them."""
