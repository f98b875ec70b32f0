"""Types, the loop over optimizee steps, trees, argument checks, files, compilation."""
