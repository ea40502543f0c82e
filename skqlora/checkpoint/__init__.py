"""A model on disk: what it is, which part of it reads text, and how that part is read in 4 bits."""
