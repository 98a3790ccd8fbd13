"""Training of selectors, with the model that they select for frozen."""
