"""Which runners are given up: the policies, and the choice of a set of victims."""
