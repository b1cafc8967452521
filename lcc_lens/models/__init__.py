"""Models: what an architecture looks like, how a model runs under hooks, and how one is loaded."""
