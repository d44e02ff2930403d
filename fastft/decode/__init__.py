"""Generates text from a model; speculation leaves the distribution of every token as it is."""
