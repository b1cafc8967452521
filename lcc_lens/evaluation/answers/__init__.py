"""Log-likelihoods of the answers to lm-eval's requests, with the context that they share read once."""
