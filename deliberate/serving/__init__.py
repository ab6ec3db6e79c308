"""An OpenAI surface over the engine: one process that decodes for many clients."""
