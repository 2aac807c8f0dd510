"""Which tokens does sample n hold? From files of text to batches, in an order that a seed fixes."""
