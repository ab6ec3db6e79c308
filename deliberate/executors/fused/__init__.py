"""The fused executor: layers with their weights in one piece, a static cache, compiled heads."""
