"""The pieces of the simulated federation: data, partition and models."""
