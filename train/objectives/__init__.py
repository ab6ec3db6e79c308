"""What a recipe optimises, one file a recipe."""
