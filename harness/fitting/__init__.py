"""Training of predictors from routing traces."""
