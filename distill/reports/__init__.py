"""Reports that compare the models of a run."""
