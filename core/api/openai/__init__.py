"""OpenAI's API: schemas, routes, and the shapes of their answers."""
