"""`deliberate bench`: one file a benchmark."""
