"""One process a rank: the executor of models that are split over several devices."""
