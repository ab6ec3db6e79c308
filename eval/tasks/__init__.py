"""What is asked: tasks and their prompts."""
