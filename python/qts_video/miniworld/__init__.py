"""A world small enough to prove selection in: seeded films of moving shapes, questions with one exact answer, and the
cells that hold what a question is about."""
