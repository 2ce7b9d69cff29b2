"""Forecasts of which experts the coming layers will need."""
