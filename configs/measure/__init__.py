"""Configurations of `deliberate eval` and `deliberate bench`, apart from training's groups: here
`model` and `task` are values, there `model` is a group."""
