"""What a model can do: perplexity of text, questions with choices, and tasks that it writes answers to."""
