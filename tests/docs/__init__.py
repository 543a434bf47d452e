"""The pages hold what they say: links, options, messages, commands."""
