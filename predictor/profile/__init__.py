"""What a predictor measures of itself, always or while somebody watches, and how it is shown."""
