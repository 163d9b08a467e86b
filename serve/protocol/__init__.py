"""The OpenAI HTTP contract as values: requests, responses, errors and stream frames. No web framework in here."""
