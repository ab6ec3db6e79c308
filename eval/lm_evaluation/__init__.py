"""lm-evaluation-harness: our models as its ``deliberate`` model, our data sets as its tasks."""
