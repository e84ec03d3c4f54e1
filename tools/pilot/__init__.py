"""The pilot of the default run: trainings that choose its settings and never see a test set."""
