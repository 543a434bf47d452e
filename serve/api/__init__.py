"""The HTTP API, in the shapes of OpenAI's images API."""
