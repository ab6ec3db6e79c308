"""Evaluation: tasks, graders, runner, statistics, report."""
