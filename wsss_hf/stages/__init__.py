"""The stages, verb first: each reads a data set or a model and writes a data set or a model."""
