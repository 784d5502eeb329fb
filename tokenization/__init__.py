"""Text becomes tokens, tokens become windows. Knows nothing of models or training."""
