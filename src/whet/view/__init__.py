"""Reports of runs: reading of run folders, curves, samples, plots as SVG, and one HTML page."""
