"""A microscope for any torch Mixture-of-Experts model: `research_eval.trace` records what its routers decide."""
