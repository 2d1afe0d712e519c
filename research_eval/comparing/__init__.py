"""Fair comparisons: models of equal size, tuned equally, scored on test rows that no choice has seen."""
