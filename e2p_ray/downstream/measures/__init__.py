"""What is measured of texts, likelihoods and rankings: pure functions over arrays and frames."""
