"""Training: data sources, losses, recipes on `transformers.Trainer`."""
