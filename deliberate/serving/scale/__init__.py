"""One server over several engines: sizes, routing, autoscaling, the front. None needs Ray."""
