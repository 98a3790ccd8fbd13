"""The parts of FlexSelect: sets of frames, queries and keys by early exit, relevance, budgets, published defaults."""
