"""Train and compare dense, Mixture-of-Experts and Graph-of-Experts sequence models."""

__version__ = "0.1.0"
