"""The OpenAI dialect: requests to native calls, answers to OpenAI's shapes."""
