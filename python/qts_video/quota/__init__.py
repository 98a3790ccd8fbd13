"""QuoTA: how many tokens each frame deserves, by what a small vision-language model sees in it (arXiv 2503.08689)."""
